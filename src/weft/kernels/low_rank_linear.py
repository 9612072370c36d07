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

from weft.kernels.keep import keep


def low_rank_linear_reference(x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """The same in plain operations."""
    return F.linear(x, W) + F.linear(F.linear(x, A), D)


@torch.library.custom_op("weft::low_rank_linear", mutates_args=())
def _forward(x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    S = x @ A.T
    return (S @ D.T).addmm_(x, W.T), S


@_forward.register_fake
def _(x, W, A, D):  # type: ignore[no-untyped-def]
    n = x.shape[0]  # not len(x): that is a number, and the graph would be for so many tokens
    return x.new_empty(n, W.shape[0]), x.new_empty(n, A.shape[0])


@torch.library.custom_op("weft::low_rank_linear_backward", mutates_args=())
def _backward(dy: Tensor, W: Tensor, A: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    dS = dy @ D
    return (dS @ A).addmm_(dy, W), dS


@_backward.register_fake
def _(dy, W, A, D):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], W.shape[1]), dy.new_empty(dy.shape[0], D.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, keep(output[1]))


def _grads(ctx: Any, dy: Tensor, _: Tensor) -> Any:
    x, W, A, D, S = ctx.saved_tensors
    dx, dS = _backward(dy, W, A, D)
    return dx, None, dS.T @ x, (S.T @ dy).T


_forward.register_autograd(_grads, setup_context=_setup)


@register_flop_formula(torch.ops.weft.low_rank_linear)
def _flops(x_shape: Any, W_shape: Any, A_shape: Any, *_: Any, **__: Any) -> int:
    (n, inside), out, rank = x_shape, W_shape[0], A_shape[0]
    return 2 * n * (out * inside + rank * (inside + out))  # type: ignore[no-any-return]


def low_rank_linear(x: Tensor, W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """y (..., out), differentiable in x, A and D.

    Args:
        x: (..., in). W: (out, in). A: (R, in). D: (out, R). All of one dtype.
    """
    y: Tensor = _forward(x.reshape(-1, x.shape[-1]), W, A, D)[0]
    return y.view(*x.shape[:-1], -1)
