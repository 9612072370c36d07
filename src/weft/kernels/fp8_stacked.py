"""One product for several frozen linear layers of one input (`weft.kernels.stacked`) whose weights are in fp8 (`weft.kernels.fp8_gemm`).

    [y_1 | y_2 | …] = s_x s_W (q(x) Wqᵀ) + S Dᵀ        S = x Aᵀ        Wq = [W_1; W_2; …], s_W their scales
    dx = s_g (q(dy ⊙ s_W) Wq) + dS A                  dS = dy D, dA = dSᵀ x and dD = dyᵀ S

x and dy are rounded once for all layers; dy by its whole row, since what counts in dx is the sum over it. The products with A, B and S
stay in x's own type. fp8 units want W turned round for dx: all layers' at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from weft.kernels.fp8_gemm import fp8_linear, fp8_product, quantise_rows, transposed
from weft.kernels.keep import keep
from weft.kernels.stacked import padded


def fp8_stacked_reference(x: Tensor, W: Tensor, scale: Tensor, A: Sequence[Tensor], D: Tensor | None = None) -> Tensor:
    """The same part by part, by the A's themselves."""
    y, S = fp8_linear(x, W, scale), F.linear(x, torch.cat([a.to(x.dtype) for a in A]))
    S = F.pad(S, (0, padded(S.shape[-1]) - S.shape[-1]))
    return torch.cat((y if D is None else y + F.linear(S, D), S), -1)


@torch.library.custom_op("weft::fp8_stacked", mutates_args=())
def _forward(
    x: Tensor, q: Tensor, q_scale: Tensor, W: Tensor, scale: Tensor, rows: Tensor, A: Sequence[Tensor], D: Tensor | None
) -> Tensor:  # fmt: skip
    Z = x.new_empty(len(x), len(W) + len(rows))
    y, S = Z.tensor_split((len(W),), 1)
    fp8_product(q, q_scale, W, scale.T, x.dtype, out=y)
    torch.mm(x, rows.T, out=S)
    if D is not None:
        y.addmm_(S, D.T)
    return Z


@_forward.register_fake
def _(x, q, q_scale, W, scale, rows, A, D):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], W.shape[0] + rows.shape[0])


@torch.library.custom_op("weft::fp8_stacked_backward", mutates_args=())
def _backward(q: Tensor, q_scale: Tensor, W: Tensor, dS: Tensor, rows: Tensor) -> Tensor:
    one = torch.ones(1, W.shape[1], dtype=torch.float32, device=W.device)
    return fp8_product(q, q_scale, transposed(W), one, dS.dtype).addmm_(dS, rows)


@_backward.register_fake
def _(q, q_scale, W, dS, rows):  # type: ignore[no-untyped-def]
    return dS.new_empty(dS.shape[0], W.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, W, scale, rows, A, D = inputs
    ctx.ranks, ctx.dtypes = [len(a) for a in A], [a.dtype for a in A]
    ctx.save_for_backward(x, W, scale, rows, D, None if D is None else keep(output[:, len(W) :]))


def _grads(ctx: Any, dZ: Tensor) -> Any:
    """Plain operations where the compiler can make one of several: rounding dy with what comes before."""
    x, W, scale, rows, D, S = ctx.saved_tensors
    dy, dS = dZ.split((len(W), len(rows)), 1)
    dD = None
    if D is not None:
        dS, dD = dy @ D, (S.T @ dy).T
    dA = (dS.T @ x).split([*ctx.ranks, len(rows) - sum(ctx.ranks)])
    dx = _backward(*quantise_rows(dy.float() * scale.T), W, dS, rows)
    return dx, None, None, None, None, None, [d.to(dtype) for d, dtype in zip(dA, ctx.dtypes, strict=False)], dD


_forward.register_autograd(_grads, setup_context=_setup)


@register_flop_formula(torch.ops.weft.fp8_stacked)
def _flops(
    x_shape: Any, q_shape: Any, q_scale_shape: Any, W_shape: Any, scale_shape: Any, rows_shape: Any, A_shapes: Any, D_shape: Any = None,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    n, inside = x_shape
    return 2 * n * ((W_shape[0] + rows_shape[0]) * inside + (0 if D_shape is None else D_shape[0] * D_shape[1]))


def fp8_stacked(x: Tensor, W: Tensor, scale: Tensor, rows: Tensor, A: Sequence[Tensor], D: Tensor | None = None) -> Tensor:
    """[y | S] (..., N + R), differentiable in x, in the A's and in D.

    Args:
        x: (..., in), 16-bit on a GPU. W: (N, in) e4m3. scale: (N, 1) fp32.
        rows: (R, in), the A's numbers in x's dtype and zeros behind; R is a multiple of 64.
        A: (r_i, in) each, in any dtype: what gets their gradients; their numbers are read in `rows`.
        D: (N, R); None: nothing is added to y, and S is for the reader, who gives its gradient.
    """
    flat = x.reshape(-1, x.shape[-1])
    Z: Tensor = _forward(flat, *quantise_rows(flat.detach()), W, scale, rows, A, D)
    return Z.view(*x.shape[:-1], Z.shape[-1])
