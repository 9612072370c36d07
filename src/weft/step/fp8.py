"""Frozen linear layers that multiply in fp8, forward and backward, where the card has such units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.core import Site, base_class, modules
from weft.kernels.fp8_gemm import both_layouts, can_fp8, fits, fp8_linear

HELD = ("w", "w_scale", "wt", "wt_scale")


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weight is held in fp8 in both layouts, 2 bytes a weight as in bf16; `weight` is empty meanwhile."""

    def forward(self, x: Tensor) -> Tensor:
        y = fp8_linear(x, *(getattr(self, f"fp8_{name}") for name in HELD))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def compute_in_fp8(model: nn.Module, layers: list[nn.Module]) -> int:
    """Turn the frozen plain linear maps inside these layers into `Fp8Linear`, in place and before adapters; how many were turned.

    A layer whose sides are no multiples of 16, and any layer on a card without fp8 units, stays as it is.
    """
    turned = 0
    for layer in layers:
        for _, module in modules(layer):
            if isinstance(module, Site) or base_class(module) is not nn.Linear or module.weight.requires_grad:
                continue
            if can_fp8(module.weight.device) and fits(module.weight):
                turn(module)
                turned += 1
    return turned


def turn(module: Any) -> None:
    """One linear layer."""
    with torch.no_grad():
        for name, value in zip(HELD, both_layouts(module.weight.detach()), strict=True):
            module.register_buffer(f"fp8_{name}", value, persistent=False)
    module.weight = nn.Parameter(module.weight.detach().new_empty(0), requires_grad=False)
    module.__class__ = Fp8Linear
