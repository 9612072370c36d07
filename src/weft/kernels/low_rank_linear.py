"""A frozen linear layer and its low-rank update as one operation.

    y = x Wᵀ + S Dᵀ        S = x Aᵀ        D = s B

after LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3). Either direction's large product adds to what the thin one wrote, where a compiler
writes both, and a third tensor that is their sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


def low_rank_linear_reference(x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """The same in plain operations."""
    return F.linear(x, W) + F.linear(F.linear(x, A), D)


def _sum(S: Tensor, D: Tensor, x: Tensor, W: Tensor) -> Tensor:
    return (S @ D).addmm_(x, W)


@torch.library.custom_op("weft::low_rank_linear", mutates_args=())
def _forward(x: Tensor, W: Tensor, S: Tensor, D: Tensor) -> Tensor:
    return _sum(S, D.T, x, W.T)


@_forward.register_fake
def _(x, W, S, D):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], W.shape[0])  # not len(x): that is a number, and the graph would be for so many tokens


@torch.library.custom_op("weft::low_rank_linear_backward", mutates_args=())
def _backward(dy: Tensor, W: Tensor, dS: Tensor, A: Tensor) -> Tensor:
    return _sum(dS, A, dy, W)


@_backward.register_fake
def _(dy, W, dS, A):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], W.shape[1])


@register_flop_formula([torch.ops.weft.low_rank_linear, torch.ops.weft.low_rank_linear_backward])
def _flops(x_shape: Any, W_shape: Any, S_shape: Any, D_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * (W_shape[0] * W_shape[1] + D_shape[0] * D_shape[1])  # type: ignore[no-any-return]


class _LowRankLinear(torch.autograd.Function):
    """S is made by an operation of its own, which y needs: so a compiler that is short of memory can keep S, and need not make y again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
        S = x @ A.T
        ctx.save_for_backward(x, W, A, D, S)
        return _forward(x, W, S, D)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, A, D, S = ctx.saved_tensors
        dS = dy @ D
        return _backward(dy, W, dS, A), None, dS.T @ x, (S.T @ dy).T


def low_rank_linear(x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """y (..., out), differentiable in x, A and D.

    Args:
        x: (..., in). W: (out, in). A: (R, in). D: (out, R). All of one dtype.
    """
    y: Tensor = _LowRankLinear.apply(x.reshape(-1, x.shape[-1]), W, A, D)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])
