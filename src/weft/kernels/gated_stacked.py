"""The inside of a gated MLP (`weft.kernels.gated`) whose gate and up came of one product (`weft.kernels.stacked`).

    Z = [g | u | S_g | S_u | 0]        dZ = [dg | du | dg B_g | du B_u | 0]

It reads columns of Z and writes columns of dZ, so that x's gradient is one product of dZ as it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from weft.kernels.gated import by, gated_backward_and_s_reference, gated_reference, launched, setup
from weft.kernels.launch import kernels

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def columns(Z: Tensor, Bg: Tensor, Bu: Tensor) -> tuple[Tensor, ...]:
    """(g, u, S_g, S_u, what is left), views."""
    (width, rg), ru = Bg.shape, Bu.shape[1]
    return Z.split((width, width, rg, ru, Z.shape[1] - 2 * width - rg - ru), 1)


@torch.library.custom_op("weft::gated_stacked", mutates_args=())
def _forward(
    Z: Tensor, Bg: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None, cu: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    work = kernels("triton_gated").gated_triton if launched(Z) else gated_reference
    g, u, Sg, Su, _ = columns(Z, Bg, Bu)
    h, S = work(g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu)
    return h, S


@_forward.register_fake
def _(Z, Bg, Bu, A, cg, cu, gelu):  # type: ignore[no-untyped-def]
    return Z.new_empty(Z.shape[0], Bg.shape[0]), Z.new_empty(Z.shape[0], A.shape[0])


@torch.library.custom_op("weft::gated_stacked_backward", mutates_args=())
def _backward(
    dh: Tensor, dS: Tensor, Z: Tensor, Bg: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None, cu: Tensor | None, gelu: bool
) -> Six:  # fmt: skip
    work = kernels("triton_gated_back").gated_backward_and_s_triton if launched(Z) else gated_backward_and_s_reference
    g, u, Sg, Su, _ = columns(Z, Bg, Bu)
    dZ = torch.empty_like(Z)
    dg, du, dSg, dSu, rest = columns(dZ, Bg, Bu)
    found = work(dh.contiguous(), dS.contiguous(), g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu, dg, du, dSg, dSu)
    rest.zero_()
    return dZ, *found[2:7]


@_backward.register_fake
def _(dh, dS, Z, Bg, Bu, A, cg, cu, gelu):  # type: ignore[no-untyped-def]
    return tuple(Z.new_empty(0) if t is None else torch.empty_like(t) for t in (Z, Bg, Bu, A, cg, cu))


_forward.register_autograd(by(_backward), setup_context=setup)


@register_flop_formula(torch.ops.weft.gated_stacked)
def _flops(Z_shape: Any, Bg_shape: Any, Bu_shape: Any, A_shape: Any, *_: Any, **__: Any) -> int:
    """As of `weft.kernels.gated`."""
    return 2 * Z_shape[0] * Bg_shape[0] * (Bg_shape[1] + Bu_shape[1] + A_shape[0])


def gated_stacked(
    Z: Tensor, Bg: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None, cu: Tensor | None = None, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """(h, S) as of `weft.kernels.gated.gated`, differentiable in everything.

    Args:
        Z: (..., 2 width + R), R at least the sum of the ranks; what lies behind S_u is not read.
        Bg, Bu: (width, r_g), (width, r_u). A: (r, width). cg, cu: (width,) in fp32, or None for ones. gelu: GELU by tanh in place of SiLU.
    """
    h, S = _forward(Z.reshape(-1, Z.shape[-1]), Bg.contiguous(), Bu.contiguous(), A.contiguous(), cg, cu, gelu)
    return h.view(*Z.shape[:-1], len(Bg)), S.view(*Z.shape[:-1], len(A))
