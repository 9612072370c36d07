"""LayerNorm tuning: only the normalisation layers are trained (Zhao et al. 2023, arXiv:2312.11420).

    h = γ ⊙ (x - μ) / σ + β        γ and β trained, everything else frozen; a layer of another kind (RMSNorm) is trained in its own form
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from weft.core import Adapter, Method, Replaced, Site, base_class


class TunedNorm(Replaced):
    """A normalisation layer with parameters of its own in place of the base's."""


@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """Trains whole copies of the normalisation layers' parameters, beside an untouched base.

    Args:
        targets: "auto": every normalisation layer (LayerNorm, RMSNorm, GroupNorm, BatchNorm, and whatever is called a norm). Or names, of
            any modules that own parameters.
    """

    targets: str | tuple[str, ...] = "auto"

    default_lr: ClassVar[float] = 1e-3  # gains near one want larger steps than weights
    site: ClassVar[str] = "modules that own parameters, normalisation layers by default"

    def accepts(self, layer: nn.Module) -> bool:
        return any(p is not None for p in layer._parameters.values())

    def auto(self, able: Mapping[str, nn.Module], heads: Collection[str]) -> Collection[str]:
        return [p for p, m in able.items() if "norm" in base_class(m).__name__.lower() and all(_flat(q) for q in m._parameters.values())]

    def build(self, layer: Site, path: str) -> Adapter:
        assert isinstance(layer, nn.Module)
        return TunedNorm(layer, [name for name, p in layer._parameters.items() if p is not None])


def _flat(p: nn.Parameter | None) -> bool:
    return p is None or p.dim() == 1
