"""One product for several frozen linear layers of one input, and for the S of their low-rank updates.

    [y_1 | y_2 | … | S] = x Wᵀ        W = [W_1; W_2; …; A_1; A_2; …; 0]        y += S Dᵀ        D = diag(s_1 B_1, s_2 B_2, …)

after LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3). x is read once, and its gradient is one product as well, [dy | dS] W with dS = dy D,
where layer by layer it is the sum of six. The zeros make S as wide as a multiple of 64, so that rows begin where kernels want them to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from weft.kernels.keep import keep

EIGHT = 8  # 16 bytes of bf16
ALIGNED = 64  # 128 bytes: where the compiler lets rows begin, so that an operation is given what it was made for and no copy


def padded(rank: int) -> int:
    """How many columns S has, and W rows for the A's."""
    return -(-rank // ALIGNED) * ALIGNED


def stacked_reference(x: Tensor, W: Tensor, A: Sequence[Tensor], D: Tensor | None = None) -> Tensor:
    """The same layer by layer, by the A's themselves."""
    rank = padded(sum(map(len, A)))
    y, S = F.linear(x, W[: len(W) - rank]), F.linear(x, torch.cat([a.to(x.dtype) for a in A]))
    S = F.pad(S, (0, rank - S.shape[-1]))
    return torch.cat((y if D is None else y + F.linear(S, D), S), -1)


@torch.library.custom_op("weft::stacked", mutates_args=())
def _forward(x: Tensor, W: Tensor, A: Sequence[Tensor], D: Tensor | None) -> Tensor:
    Z = x @ W.T
    if D is not None:
        y, S = Z.tensor_split((len(D),), 1)
        y.addmm_(S, D.T)
    return Z


@_forward.register_fake
def _(x, W, A, D):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], W.shape[0])  # not len(x): that is a number, and the graph would be for so many tokens


@torch.library.custom_op("weft::stacked_tail", mutates_args=("dZ",))
def _tail(dZ: Tensor, D: Tensor) -> None:
    """dS = dy D in its columns. An operation, since the compiler copies all of dZ to replace some columns of it."""
    dy, dS = dZ.tensor_split((len(D),), 1)
    torch.mm(dy, D, out=dS)


@_tail.register_fake
def _(dZ, D):  # type: ignore[no-untyped-def]
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W, A, D = inputs
    ctx.ranks, ctx.dtypes = [len(a) for a in A], [a.dtype for a in A]
    ctx.save_for_backward(x, W, D, None if D is None else keep(output[:, len(D) :]))


def _grads(ctx: Any, dZ: Tensor) -> Any:
    """Plain operations, so that the compiler writes what dZ is made of into one tensor, and dS into that."""
    x, W, D, S = ctx.saved_tensors
    rank = padded(sum(ctx.ranks))
    width, dD = len(W) - rank, None
    if D is not None:
        dZ = dZ.clone()  # the compiler leaves this out, where dZ is nobody else's
        _tail(dZ, D)
        dD = (S.T @ dZ[:, :width]).T
    rows = (dZ[:, width:].T @ x).split([*ctx.ranks, rank - sum(ctx.ranks)])
    return dZ @ W, None, [d.to(dtype) for d, dtype in zip(rows, ctx.dtypes, strict=False)], dD


_forward.register_autograd(_grads, setup_context=_setup)


@register_flop_formula(torch.ops.weft.stacked)
def _flops(x_shape: Any, W_shape: Any, A_shapes: Any, D_shape: Any = None, *_: Any, **__: Any) -> int:
    n, inside = x_shape
    return 2 * n * (W_shape[0] * inside + (0 if D_shape is None else D_shape[0] * D_shape[1]))


def stacked(x: Tensor, W: Tensor, A: Sequence[Tensor], D: Tensor | None = None) -> Tensor:
    """[y | S] (..., N + R), differentiable in x, in the A's and in D.

    Args:
        x: (..., in). W: (N + R, in), whose last R rows hold the A's numbers in x's dtype and zeros behind; R is a multiple of 64.
        A: (r_i, in) each, in any dtype: what gets their gradients; their numbers are read in W.
        D: (N, R); None: nothing is added to y, and S is for the reader, who gives its gradient.
    """
    Z: Tensor = _forward(x.reshape(-1, x.shape[-1]), W, A, D)
    return Z.view(*x.shape[:-1], -1)
