"""Gated MLPs with LoRA or DoRA on all of their maps: what lies between their products becomes one operation (`weft.kernels.gated`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Site, is_linear, is_sharded, modules, unmerged
from weft.kernels.gated import gated
from weft.kernels.gated_stacked import gated_stacked
from weft.kernels.keep import keep
from weft.methods.dora import DecomposedLinear
from weft.methods.lora_linear import LowRank
from weft.step.placed import forward_of, take

Way = Callable[[Any, Tensor], Tensor]
MAPS = ("gate_proj", "up_proj", "down_proj")
STACK = "weft_stack"  # where a module has its `weft.step.stacked.Stack`, past its parameters and submodules
WIDEST = 64  # rank: the factors of a block of columns and the sums of their gradients stay in registers


def gated_mlps(model: nn.Module) -> dict[nn.Module, Way]:
    """The MLPs that compute down(act(gate(x)) · up(x)) and have LoRA or DoRA on all three maps, and what stands in for each's forward;
    found by their names and by trying."""
    able = (m for _, m in modules(model) if {*MAPS, "act_fn"} <= m._modules.keys() and ready(m))
    return {m: way for m in able if (way := _way(m)) is not None}


def ready(mlp: Any) -> bool:
    """Whether each of its maps has one LoRA or DoRA at work and nothing that these do not always have, and the MLP itself no adapter."""
    return getattr(mlp, "plan", None) is None and all(usual(mlp._modules[name]) for name in MAPS)


def usual(layer: Any) -> bool:
    """Whether one plain LoRA or DoRA works on this linear layer, and nothing that these do not always have."""
    plan = layer.plan if isinstance(layer, Site) and is_linear(layer) else None
    if type(plan) not in (LowRank, DecomposedLinear) or plan.A.shape[0] > WIDEST:
        return False
    if type(plan) is DecomposedLinear and (layer.bias is not None or unmerged(layer) is not layer):
        return False
    return plan.b is None and plan.bias is None and not (plan.dropout and plan.training)


def _way(mlp: Any) -> Way | None:
    """By which of the activations its own forward is that formula: two tokens, to the last bit. One that somebody hooked or replaced is
    left alone, as is one of which this process has a part."""
    if any(map(touched, (mlp, *(mlp._modules[name] for name in MAPS)))) or any(map(is_sharded, mlp.parameters())):
        return None
    width = cast(int, mlp.gate_proj.in_features)
    x = torch.linspace(-2, 2, 2 * width, device=mlp.down_proj.weight.device).to(dtype_of(mlp)).view(1, 2, width)
    with torch.no_grad():
        own, gate, up = mlp(x), mlp.gate_proj(x), mlp.up_proj(x)
        ways = ((with_silu, F.silu(gate)), (with_gelu, F.gelu(gate, approximate="tanh")))
        return next((way for way, act in ways if torch.equal(own, mlp.down_proj(act * up))), None)


def dtype_of(mlp: Any) -> torch.dtype:
    """That of its weights as numbers."""
    weight = mlp.down_proj.weight
    dtype: torch.dtype = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else mlp.down_proj.dtype
    return dtype


def touched(m: Any) -> bool:
    """Whether somebody has hooked it or replaced its forward."""
    return "forward" in vars(m) or bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def with_silu(self: Any, x: Tensor) -> Tensor:
    """What stands in for the MLP's own forward, with self for the MLP."""
    return _forward(self, x, gelu=False)


def with_gelu(self: Any, x: Tensor) -> Tensor:
    """The same with GELU by tanh."""
    return _forward(self, x, gelu=True)


def _forward(self: Any, x: Tensor, gelu: bool) -> Tensor:
    """In training; evaluation, where DoRA keeps its norms, goes by the MLP's own."""
    if not (torch.is_grad_enabled() and ready(self)):  # another adapter may have come to work since
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    stack = getattr(self, STACK, None)
    if stack is not None and stack.on:
        (_, Bg, cg), (_, Bu, cu), (Ad, Bd, cd) = (factors(self._modules[name], x.dtype) for name in MAPS)
        h, S = gated_stacked(stack.product(x), Bg, Bu, Ad, cg, cu, gelu)
    else:
        g, u = self.gate_proj.frozen(x), self.up_proj.frozen(x)
        (Ag, Bg, cg), (Au, Bu, cu), (Ad, Bd, cd) = (factors(self._modules[name], g.dtype) for name in MAPS)
        Sg, Su = F.linear(x, torch.cat((Ag, Au))).split((len(Ag), len(Au)), -1)  # x is read once for both, and its gradient written once
        h, S = gated(g, u, Sg, Bg, Su, Bu, Ad, cg, cu, gelu)
    y = cast(Tensor, self.down_proj.frozen(h) + F.linear(keep(S), Bd))
    return y if cd is None else (y * cd).to(y.dtype)


def factors(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, s B, and DoRA's c = m / ‖W₀ + s B A‖ in fp32."""
    plan = layer.plan
    c = plan.m / plan.norm(layer) if type(plan) is DecomposedLinear else None
    return plan.A.to(dtype), (plan.scale * plan.B).to(dtype), c


def finished(layer: Any, c: Tensor | None, y: Tensor) -> Tensor:
    """What the layer gives: y with DoRA's factor, or with the bias."""
    if c is not None:
        return (y * c).to(y.dtype)
    return y if layer.bias is None else y + layer.bias


def install(mlps: Mapping[nn.Module, Way]) -> None:
    for mlp, way in mlps.items():
        forward_of(mlp, way)


def uninstall(mlps: Iterable[nn.Module]) -> None:
    for mlp in mlps:
        take(mlp, "forward")
