"""Linear layers of one input as one product with their low-rank updates in it.

    [y_1 | y_2 | …] = [x | S] [W | D]ᵀ        S = x Aᵀ        [W | D] = [W_1 s_1 B_1 0 …; W_2 0 s_2 B_2 …; …]        A = [A_1; A_2; …; 0]

after LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3). Where the update is a product of its own, all of y is read and written once more.
The gradient of x is one product as well, [dy | dS] [W; A] with dS = dy D. D's place beside W and A's below it are scratch: each operation
fills what it reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from weft.kernels.keep import keep
from weft.kernels.stacked import EIGHT

FUSED = 8  # parts of a tensor that inductor's lowering of cat writes by one kernel, at most: of more, each is written to its place at once


def stacked_added_reference(x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """The same in plain operations."""
    S = F.linear(x, A)
    return torch.cat((F.linear(x, W[: len(D), : x.shape[-1]]) + F.linear(S, D), S), -1)


@torch.library.custom_op("weft::stacked_added", mutates_args=("X",))
def _forward(X: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """[y | S], S put into the last columns of X = [x | 0] as well."""
    (rank, inside), width = A.shape, len(D)
    Z = X.new_empty(len(X), width + rank)
    (x, S), (y, last) = X.tensor_split((inside,), 1), Z.tensor_split((width,), 1)
    torch.mm(x, A.T, out=S)
    W.data[:width, inside:].copy_(D)  # of .data: writes to scratch are not counted, and change nothing that a backward pass is owed
    torch.mm(X, W[:width].T, out=y)
    last.copy_(S)
    return Z


@_forward.register_fake
def _(X, W, A, D):  # type: ignore[no-untyped-def]
    return X.new_empty(X.shape[0], W.shape[0])  # not len(X): that is a number, and the graph would be for so many tokens


@torch.library.custom_op("weft::stacked_added_backward", mutates_args=("dZ",))
def _backward(dZ: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """dx, and dS in the last columns of dZ. An operation, since the compiler copies all of dZ to replace some columns of it."""
    inside, width = A.shape[1], len(D)
    dy, dS = dZ.tensor_split((width,), 1)
    torch.mm(dy, D, out=dS)
    W.data[width:, :inside].copy_(A)
    return dZ @ W[:, :inside]


@_backward.register_fake
def _(dZ, W, A, D):  # type: ignore[no-untyped-def]
    return dZ.new_empty(dZ.shape[0], A.shape[1])


@register_flop_formula(torch.ops.weft.stacked_added)
def _flops(X_shape: Any, W_shape: Any, A_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * X_shape[0] * (W_shape[0] * W_shape[1] + A_shape[0] * A_shape[1])  # type: ignore[no-any-return]


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
        rest = [EIGHT] * (FUSED - 1)
        Z = _forward(torch.cat([x, *(x.new_zeros(x.shape[0], n) for n in (*rest, len(A) - sum(rest)))], 1), W, A, D)
        ctx.save_for_backward(x, W, A, D, keep(Z[:, len(D) :]))
        return Z

    @staticmethod
    def backward(ctx: Any, dZ: Tensor) -> Any:
        """Plain operations around the one, so that the compiler writes what dZ is made of into one tensor, and dS into that."""
        x, W, A, D, S = ctx.saved_tensors
        dZ = dZ.clone()  # the compiler leaves this out, where dZ is nobody else's
        dx = _backward(dZ, W, A, D)
        dy, dS = dZ.tensor_split((len(D),), 1)
        return dx, None, dS.T @ x, (S.T @ dy).T


def stacked_added(x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """[y | S] (..., N + R), differentiable in x, A and D by its y; S is for whoever looks, and gives no gradient.

    Args:
        x: (..., in). W: (N + R, in + R), the frozen weights in its first N rows and in columns; the rest is scratch.
        A: (R, in), zeros behind its rows; R is a multiple of 64. D: (N, R). All of one dtype.
    """
    Z: Tensor = _Added.apply(x.reshape(-1, x.shape[-1]), W, A, D)  # type: ignore[no-untyped-call]
    return Z.view(*x.shape[:-1], Z.shape[-1])
