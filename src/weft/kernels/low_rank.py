"""y + s·(x Aᵀ) Bᵀ, the update of LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3), without a temporary of y's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def low_rank_add_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, off: Tensor | None = None) -> Tensor:
    """The same in plain operations; the compiler fuses them better than any hand-written function here."""
    S = F.linear(x, A)
    return y + scale * F.linear(S if off is None else S.masked_fill(off, 0), B)


class _LowRankAdd(torch.autograd.Function):
    """Adds in place onto y, which is fresh from the frozen layer and of no other use.

    Keeps S = xAᵀ, rank / in of x's size, and x itself only where A is trained.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, off: Tensor | None) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        S = x2 @ A.T
        if off is not None:
            off = off.reshape(-1, 1)
            S.masked_fill_(off, 0)
        y.view(-1, y.shape[-1]).addmm_(S, B.T, alpha=scale)
        ctx.mark_dirty(y)
        _, _, A_trains, B_trains, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x2 if A_trains else None, S if B_trains else None, A, B, off)
        ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, S, A, B, off = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        dS = (g2 @ B).mul_(ctx.scale)
        if off is not None:
            dS.masked_fill_(off, 0)
        dx = (dS @ A).view(ctx.shape) if ctx.needs_input_grad[1] else None
        dA = dS.T @ x if ctx.needs_input_grad[2] else None
        dB = (S.T @ g2).mul_(ctx.scale).T if ctx.needs_input_grad[3] else None  # in this order BLAS is up to ten times faster than gᵀS
        return g, dx, dA, dB, None, None


def low_rank_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, off: Tensor | None = None) -> Tensor:
    """y + scale · (x Aᵀ) Bᵀ, computed in y's dtype. May write into y.

    Args:
        y: (..., out), the frozen layer's output. x: (..., in). A: (rank, in). B: (out, rank). scale: alpha / rank.
        off: (..., 1) bool, the places where nothing is added: there y stays as it is, bit for bit.
    """
    if A.dtype != y.dtype:
        x, A, B = x.to(y.dtype), A.to(y.dtype), B.to(y.dtype)
    if torch.compiler.is_compiling() or not y.is_contiguous():
        return low_rank_add_reference(y, x, A, B, scale, off)
    if torch.is_grad_enabled():
        return _LowRankAdd.apply(y, x, A, B, scale, off)  # type: ignore[no-any-return, no-untyped-call]
    S = F.linear(x, A)
    y.view(-1, y.shape[-1]).addmm_((S if off is None else S.masked_fill_(off, 0)).view(-1, A.shape[0]), B.T, alpha=scale)
    return y
