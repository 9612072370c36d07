"""One product for several frozen linear layers of one input, and for the S of their low-rank updates.

    [y_1 | y_2 | … | S] = x Wᵀ        W = [W_1; W_2; …; A_1; A_2; …; 0]        S = x Aᵀ

after LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3), where whoever reads S adds S Bᵀ. x is read once, and its gradient is one product as
well, [dy | dS] W, where layer by layer it is the sum of four. The zeros make S as wide as a multiple of 64, so that rows begin where
kernels want them to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

EIGHT = 8  # 16 bytes of bf16
ALIGNED = 64  # 128 bytes: where the compiler lets rows begin, so that an operation is given what it was made for and no copy


def padded(rank: int) -> int:
    """How many columns S has, and W rows for the A's."""
    return -(-rank // ALIGNED) * ALIGNED


def stacked_reference(x: Tensor, W: Tensor, A: Sequence[Tensor]) -> Tensor:
    """The same layer by layer, by the A's themselves."""
    rank = padded(sum(map(len, A)))
    S = F.linear(x, torch.cat([a.to(x.dtype) for a in A]))
    return torch.cat((F.linear(x, W[: len(W) - rank]), F.pad(S, (0, rank - S.shape[-1]))), -1)


@torch.library.custom_op("weft::stacked", mutates_args=())
def _forward(x: Tensor, W: Tensor, A: Sequence[Tensor]) -> Tensor:
    return x @ W.T


@_forward.register_fake
def _(x, W, A):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], W.shape[0])  # not len(x): that is a number, and the graph would be for so many tokens


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W, A = inputs
    ctx.ranks, ctx.dtypes = [len(a) for a in A], [a.dtype for a in A]
    ctx.save_for_backward(x, W)


def _grads(ctx: Any, dZ: Tensor) -> Any:
    """Plain operations, so that the compiler writes what dZ is made of into one tensor."""
    x, W = ctx.saved_tensors
    rank = padded(sum(ctx.ranks))
    rows = (dZ[:, len(W) - rank :].T @ x).split([*ctx.ranks, rank - sum(ctx.ranks)])
    return dZ @ W, None, [d.to(dtype) for d, dtype in zip(rows, ctx.dtypes, strict=False)]


_forward.register_autograd(_grads, setup_context=_setup)


@register_flop_formula(torch.ops.weft.stacked)
def _flops(x_shape: Any, W_shape: Any, A_shapes: Any, *_: Any, **__: Any) -> int:
    n, inside = x_shape
    return 2 * n * W_shape[0] * inside  # type: ignore[no-any-return]


def stacked(x: Tensor, W: Tensor, A: Sequence[Tensor]) -> Tensor:
    """[y | S] (..., N + R), differentiable in x and in the A's.

    Args:
        x: (..., in). W: (N + R, in), whose last R rows hold the A's numbers in x's dtype and zeros behind; R is a multiple of 64.
        A: (r_i, in) each, in any dtype: what gets their gradients; their numbers are read in W.
    """
    Z: Tensor = _forward(x.reshape(-1, x.shape[-1]), W, A)
    return Z.view(*x.shape[:-1], Z.shape[-1])
