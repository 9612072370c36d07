"""The low-rank updates of several adapters whose lines lie span by span: a batched product for all, written into y.

    y_i + S_i B_iᵀ        S_i = x_i A_iᵀ

after LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3), for each span i. `torch.baddbmm` copies y first, and where the compiler makes the
backward pass by itself the gradients of A and B come out transposed, so that they are added to what is there number by number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_spans_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The same in plain operations."""
    return torch.baddbmm(y, torch.bmm(x, A.mT), B.mT)


@torch.library.custom_op("weft::add_spans", mutates_args=("y",))
def _add(y: Tensor, S: Tensor, B: Tensor) -> None:
    y.baddbmm_(S, B.mT)


@_add.register_fake
def _(y, S, B):  # type: ignore[no-untyped-def]
    return None


class _AddSpans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        S = torch.bmm(x, A.mT)
        ctx.save_for_backward(x, S, A, B)
        y = y.clone()  # the compiler leaves this out, where y is nobody else's
        _add(y, S, B)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, S, A, B = ctx.saved_tensors
        dS = torch.bmm(dy, B)
        return dy, torch.bmm(dS, A), torch.bmm(dS.mT, x), torch.bmm(dy.mT, S)  # those of A and B lie as A and B do


def add_spans(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y + S Bᵀ with S = x Aᵀ, differentiable in all four.

    Args:
        y: (spans, n, out), of one type with the others. x: (spans, n, in). A: (spans, rank, in). B: (spans, out, rank), the scale in it.
    """
    if not torch.compiler.is_compiling():
        return add_spans_reference(y, x, A, B)
    made: Tensor = _AddSpans.apply(y, x, A, B)  # type: ignore[no-untyped-call]
    return made
