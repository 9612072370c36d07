"""Full fine-tuning: every weight trainable, in the same loop, so that each comparison has its baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from weft.core import Adapter, Method, Replaced, Site


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Every parameter of the targets is trained, as an fp32 copy beside the base: the base stays as it was, and the copy can be
    saved, swapped and merged like any adapter. Costs 4 bytes a parameter for the copy and 8 for Adam's moments.

    Args:
        targets: "all" (every module that owns parameters), or names, globs and regular expressions as for any method.
    """

    targets: str | tuple[str, ...] = "all"

    default_lr: ClassVar[float] = 2e-5  # a tenth of LoRA's: Schulman et al. 2025 find the best rates ×10 apart
    site: ClassVar[str] = "modules that own parameters"

    def accepts(self, layer: nn.Module) -> bool:
        return any(p is not None for p in layer._parameters.values())

    def build(self, layer: Site, path: str) -> Adapter:
        return self.build_all({path: layer})[path]

    def build_all(self, layers: Mapping[str, Site]) -> dict[str, Adapter]:
        shared: dict[int, nn.Parameter] = {}  # tied weights stay tied
        return {path: Replaced(layer, _own(layer), shared) for path, layer in layers.items()}


def _own(layer: object) -> list[str]:
    assert isinstance(layer, nn.Module)
    return [name for name, p in layer._parameters.items() if p is not None]
