"""The inside of a gated MLP (SwiGLU: Shazeer 2020, arXiv:2002.05202, eq. 6) with LoRA or DoRA on all three of its maps.

    h = act(c_g (g + S_g B_gᵀ)) ⊙ c_u (u + S_u B_uᵀ)        S = h Aᵀ        act(x) = x σ(p(x))

g and u are what the frozen gate and up make of x, S_g = x A_gᵀ and S_u = x A_uᵀ; LoRA's scales are in the B's; c is DoRA's magnitude over
the norm, for each output, and there is none with LoRA; S is for down's own B. p(x) = x is SiLU, and p(x) = √(8/π) (x + 0.044715 x³) GELU by
tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415), as in Gemma. Written out in plain operations every term of the MLP's width
goes through memory as a tensor of its own, eighteen of them forward and back, and eleven are there at once; here it is ten, and five at
once. For the backward pass g and u are kept, and no h.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from weft.kernels.launch import kernels, usable

ROOT, CUBE = sqrt(8 / pi), 0.044715
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _within(y: Tensor, S: Tensor, B: Tensor) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.to(wide) + S.to(wide) @ B.to(wide).T


def _scaled(z: Tensor, c: Tensor | None) -> Tensor:
    return z if c is None else z * c.to(z.dtype)


def _into(place: Tensor | None, t: Tensor) -> Tensor:
    return t if place is None else place.copy_(t)


def _within_sigmoid(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor | float]:
    """p(x) and its slope."""
    return (ROOT * (x + CUBE * x**3), ROOT * (1 + 3 * CUBE * x * x)) if gelu else (x, 1.0)


def gated_reference(
    g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None, cu: Tensor | None = None,
    gelu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h, S) in plain operations, each rounded once; S is of the rounded h."""
    gate, up = _scaled(_within(g, Sg, Bg), cg), _scaled(_within(u, Su, Bu), cu)
    h = (gate * torch.sigmoid(_within_sigmoid(gate, gelu)[0]) * up).to(g.dtype)
    return h, h @ A.T


def gated_backward_reference(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None,
    cu: Tensor | None = None, gelu: bool = False, dg: Tensor | None = None, du: Tensor | None = None,
) -> Seven:  # fmt: skip
    """(dg, du, and the gradients of Bg, Bu, A, cg and cu), rounded once; those of a c that is not there are empty. A dg or du that is given
    is written into."""
    within, beside = _within(g, Sg, Bg), _within(u, Su, Bu)
    gate, up, wide = _scaled(within, cg), _scaled(beside, cu), within.dtype
    dh = dh.to(wide) + dS.to(wide) @ A.to(wide)
    p, slope = _within_sigmoid(gate, gelu)
    sig = torch.sigmoid(p)
    act = gate * sig
    dgate, dup, h = dh * up * (sig + act * (1 - sig) * slope), dh * act, (act * up).to(g.dtype)
    dcg, dcu = (g.new_empty(0) if c is None else (d * z).sum(0).to(c.dtype) for c, d, z in ((cg, dgate, within), (cu, dup, beside)))
    dg, du = _into(dg, _scaled(dgate, cg).to(g.dtype)), _into(du, _scaled(dup, cu).to(g.dtype))
    dBg, dBu, dA = dg.T.to(wide) @ Sg.to(wide), du.T.to(wide) @ Su.to(wide), dS.T.to(wide) @ h.to(wide)
    return dg, du, dBg.to(Bg.dtype), dBu.to(Bu.dtype), dA.to(A.dtype), dcg, dcu


def gated_backward_and_s_reference(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None,
    cu: Tensor | None = None, gelu: bool = False, dg: Tensor | None = None, du: Tensor | None = None, dSg: Tensor | None = None,
    dSu: Tensor | None = None,
) -> Nine:  # fmt: skip
    """The same, and the gradients of S_g and S_u behind it, of the rounded dg and du; given ones are written into."""
    found = gated_backward_reference(dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu, dg, du)
    return *found, torch.mm(found[0], Bg, out=dSg), torch.mm(found[1], Bu, out=dSu)


def launched(t: Tensor) -> bool:
    """Whether the kernels work on rows such as these: of none there is nothing to launch."""
    return usable(t) and len(t) > 0


@torch.library.custom_op("weft::gated", mutates_args=())
def _forward(
    g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None, cu: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    work = kernels("triton_gated").gated_triton if launched(g) else gated_reference
    h, S = work(g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu)
    return h, S


@_forward.register_fake
def _(g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu):  # type: ignore[no-untyped-def]
    return torch.empty_like(g), g.new_empty(g.shape[0], A.shape[0])  # len(g) is a number, and the graph would be for so many tokens


@torch.library.custom_op("weft::gated_backward", mutates_args=())
def _backward(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None,
    cu: Tensor | None, gelu: bool,
) -> Nine:  # fmt: skip
    work = kernels("triton_gated_back").gated_backward_and_s_triton if launched(g) else gated_backward_and_s_reference
    dg, du, dBg, dBu, dA, dcg, dcu, dSg, dSu = work(dh.contiguous(), dS.contiguous(), g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu)
    return dg, du, dSg, dBg, dSu, dBu, dA, dcg, dcu


@_backward.register_fake
def _(dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu):  # type: ignore[no-untyped-def]
    return tuple(g.new_empty(0) if t is None else torch.empty_like(t) for t in (g, u, Sg, Bg, Su, Bu, A, cg, cu))


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep everything that the operation was given: tensors, or None, and whether it is GELU."""
    ctx.save_for_backward(*inputs[:-1])
    ctx.gelu = inputs[-1]


def by(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Gradients of what `setup` kept, by an operation that gives one for each, an empty one for each None."""

    def grads(ctx: Any, dh: Tensor, dS: Tensor) -> Any:
        held = ctx.saved_tensors
        found = backward(dh, dS, *held, ctx.gelu)
        return *(None if t is None else d for t, d in zip(held, found, strict=True)), None

    return grads


_forward.register_autograd(by(_backward), setup_context=setup)


@register_flop_formula(torch.ops.weft.gated)
def _flops(g_shape: Any, u_shape: Any, Sg_shape: Any, Bg_shape: Any, Su_shape: Any, Bu_shape: Any, A_shape: Any, *_: Any, **__: Any) -> int:
    """What the compiler goes by when it chooses what to keep: S is small and saves the whole operation."""
    n, width = g_shape
    return 2 * n * width * (Bg_shape[1] + Bu_shape[1] + A_shape[0])


def gated(
    g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None, cu: Tensor | None = None,
    gelu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h, S), differentiable in everything; see above.

    Args:
        g, u: (..., width). Sg: (..., r), Bg: (width, r) and the like for up, whose rank may be another. A: (r, width).
        cg, cu: (width,) in fp32, or None for ones. gelu: GELU by tanh in place of SiLU.
    """
    flat = [t.reshape(-1, t.shape[-1]).contiguous() for t in (g, u, Sg, Su)]
    h, S = _forward(flat[0], flat[1], flat[2], Bg.contiguous(), flat[3], Bu.contiguous(), A.contiguous(), cg, cu, gelu)
    return h.view(g.shape), S.view(*g.shape[:-1], len(A))
