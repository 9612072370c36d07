"""The inside of a gated MLP (SwiGLU: Shazeer 2020, arXiv:2002.05202, eq. 6) with LoRA on all three of its maps.

    h = silu(g + S_g B_gᵀ) ⊙ (u + S_u B_uᵀ)        S = h Aᵀ

g and u are what the frozen gate and up make of x, S_g = x A_gᵀ and S_u = x A_uᵀ; the scales are in the B's; S is for down's own B. Written
out in plain operations every term of the MLP's width goes through memory as a tensor of its own, eighteen of them forward and back, and
eleven are there at once; here it is seven, and five at once. For the backward pass g and u are kept, and no h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from weft.kernels.launch import kernels, usable

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _inside(g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(g.dtype, torch.float32)
    return g.to(wide) + Sg.to(wide) @ Bg.to(wide).T, u.to(wide) + Su.to(wide) @ Bu.to(wide).T


def gated_reference(g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor) -> Tensor:
    """h in plain operations, rounded once."""
    gate, up = _inside(g, u, Sg, Bg, Su, Bu)
    return (gate * torch.sigmoid(gate) * up).to(g.dtype)


def gated_backward_reference(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dg, du, and the gradients of Bg, Bu and A), rounded once."""
    gate, up = _inside(g, u, Sg, Bg, Su, Bu)
    wide = gate.dtype
    dh = dh.to(wide) + dS.to(wide) @ A.to(wide)
    sig = torch.sigmoid(gate)
    act = gate * sig
    dg, du, h = ((dh * up * (sig + act * (1 - sig))).to(g.dtype), (dh * act).to(g.dtype), (act * up).to(g.dtype))
    dBg, dBu, dA = dg.T.to(wide) @ Sg.to(wide), du.T.to(wide) @ Su.to(wide), dS.T.to(wide) @ h.to(wide)
    return dg, du, dBg.to(Bg.dtype), dBu.to(Bu.dtype), dA.to(A.dtype)


@torch.library.custom_op("weft::gated", mutates_args=())
def _forward(g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    h = kernels("triton_gated").gated_triton(g, u, Sg, Bg, Su, Bu) if usable(g) else gated_reference(g, u, Sg, Bg, Su, Bu)
    return h, h @ A.T


@_forward.register_fake
def _(g, u, Sg, Bg, Su, Bu, A):  # type: ignore[no-untyped-def]
    return torch.empty_like(g), g.new_empty(len(g), len(A))


@torch.library.custom_op("weft::gated_backward", mutates_args=())
def _backward(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = kernels("triton_gated").gated_backward_triton if usable(g) else gated_backward_reference
    dg, du, dBg, dBu, dA = work(dh.contiguous(), dS.contiguous(), g, u, Sg, Bg, Su, Bu, A)
    return dg, du, dg @ Bg, dBg, du @ Bu, dBu, dA


@_backward.register_fake
def _(dh, dS, g, u, Sg, Bg, Su, Bu, A):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (g, u, Sg, Bg, Su, Bu, A))


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _grads(ctx: Any, dh: Tensor, dS: Tensor) -> Grads:
    return _backward(dh, dS, *ctx.saved_tensors)  # type: ignore[no-any-return]


_forward.register_autograd(_grads, setup_context=_setup)


@register_flop_formula(torch.ops.weft.gated)
def _flops(g_shape: Any, u_shape: Any, Sg_shape: Any, Bg_shape: Any, Su_shape: Any, Bu_shape: Any, A_shape: Any, **_: Any) -> int:
    """What the compiler goes by when it chooses what to keep: S is small and saves the whole operation."""
    n, width = g_shape
    return 2 * n * width * (Bg_shape[1] + Bu_shape[1] + A_shape[0])


def gated(g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(h, S), differentiable in everything; see above.

    Args:
        g, u: (..., width). Sg: (..., r), Bg: (width, r) and the like for up, whose rank may be another. A: (r, width).
    """
    flat = [t.reshape(-1, t.shape[-1]).contiguous() for t in (g, u, Sg, Su)]
    h, S = _forward(flat[0], flat[1], flat[2], Bg.contiguous(), flat[3], Bu.contiguous(), A.contiguous())
    return h.view(g.shape), S.view(*g.shape[:-1], -1)
