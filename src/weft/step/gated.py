"""Gated MLPs with LoRA or DoRA on all of their maps: what lies between their products becomes one operation (`weft.kernels.gated`)."""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Site, is_linear, modules, unmerged
from weft.kernels.gated import gated
from weft.kernels.keep import keep
from weft.methods.dora import DecomposedLinear
from weft.methods.lora_linear import LowRank

MAPS = ("gate_proj", "up_proj", "down_proj")
WIDEST = 64  # rank: the factors of a block of columns and the sums of their gradients stay in registers


def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """The MLPs that compute down(silu(gate(x)) · up(x)) and have LoRA or DoRA on all three maps; found by their names and by trying."""
    return [m for _, m in modules(model) if {*MAPS, "act_fn"} <= m._modules.keys() and ready(m) and _computes_it(m)]


def ready(mlp: Any) -> bool:
    """Whether each of its maps has one LoRA or DoRA at work and nothing that these do not always have, and the MLP itself no adapter."""
    return getattr(mlp, "plan", None) is None and all(_usual(mlp._modules[name]) for name in MAPS)


def _usual(layer: Any) -> bool:
    plan = layer.plan if isinstance(layer, Site) and is_linear(layer) else None
    if type(plan) not in (LowRank, DecomposedLinear) or plan.A.shape[0] > WIDEST:
        return False
    if type(plan) is DecomposedLinear and (layer.bias is not None or unmerged(layer) is not layer):
        return False
    return plan.b is None and plan.bias is None and not (plan.dropout and plan.training)


def _computes_it(mlp: Any) -> bool:
    """Whether its own forward is that formula: two tokens, to the last bit. One that somebody hooked or replaced is left alone."""
    if any(map(_touched, (mlp, *(mlp._modules[name] for name in MAPS)))):
        return False
    weight = mlp.down_proj.weight
    dtype = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else mlp.down_proj.dtype
    width = cast(int, mlp.gate_proj.in_features)
    x = torch.linspace(-2, 2, 2 * width, device=weight.device).to(dtype).view(1, 2, width)
    with torch.no_grad():
        return torch.equal(mlp(x), mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


def _touched(m: Any) -> bool:
    return "forward" in vars(m) or bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def forward(self: Any, x: Tensor) -> Tensor:
    """What stands in for the MLP's own forward in training; evaluation, where DoRA keeps its norms, goes by its own."""
    if not (torch.is_grad_enabled() and ready(self)):  # another adapter may have come to work since
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    g, u = self.gate_proj.frozen(x), self.up_proj.frozen(x)
    (Ag, Bg, cg), (Au, Bu, cu), (Ad, Bd, cd) = (_factors(self._modules[name], g.dtype) for name in MAPS)
    Sg, Su = F.linear(x, torch.cat((Ag, Au))).split((len(Ag), len(Au)), -1)  # x is read once for both, and its gradient written once
    h, S = gated(g, u, Sg, Bg, Su, Bu, Ad, cg, cu)
    y = cast(Tensor, self.down_proj.frozen(h) + F.linear(keep(S), Bd))
    return y if cd is None else (y * cd).to(y.dtype)


def _factors(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, s B, and DoRA's c = m / ‖W₀ + s B A‖ in fp32."""
    plan = layer.plan
    c = plan.m / plan.norm(layer) if type(plan) is DecomposedLinear else None
    return plan.A.to(dtype), (plan.scale * plan.B).to(dtype), c


def install(mlps: list[nn.Module]) -> None:
    for mlp in mlps:
        mlp.forward = MethodType(forward, mlp)  # one function for all, so that all layers share one compiled graph


def uninstall(mlps: list[nn.Module]) -> None:
    for mlp in mlps:
        vars(mlp).pop("forward", None)
