"""Linear layers that are in no stack and no fused MLP: each with its adapter as one operation (`weft.kernels.low_rank_linear`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from weft.kernels.low_rank_linear import low_rank_linear
from weft.kernels.stacked import padded
from weft.step.gated import factors, finished, usual
from weft.step.placed import forward_of, take
from weft.step.stackable import plain


def lone(layers: Iterable[nn.Module], taken: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Those in these layers of the model, and their names. taken: what is stacked or fused already."""
    taken = set(taken)
    found = (pair for part in layers for m in part.modules() for pair in m._modules.items())
    return {m: name for name, m in found if m is not None and m not in taken and _able(m)}


def _able(layer: Any) -> bool:
    return plain(layer, ()) and getattr(layer, "plan", None) is not None


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or kwargs or len(args) != 1 or not usual(self) or self.weight.requires_grad:  # as it is now
        return type(self).forward(self, *args, **kwargs)
    (x,) = args
    A, B, c = factors(self, x.dtype)
    wide = padded(len(A)) - len(A)  # rows that begin where kernels want them to
    return finished(self, c, low_rank_linear(x, self.weight, F.pad(A, (0, 0, 0, wide)), F.pad(B, (0, wide))))


def install(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        forward_of(layer, _forward)


def uninstall(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        take(layer, "forward")


def named(layers: Mapping[nn.Module, str]) -> str:
    """In words."""
    return ", ".join(f"{name.removesuffix('_proj')} of {n} layers" for name, n in Counter(layers.values()).items())
