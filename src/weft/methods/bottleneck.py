"""Bottleneck adapters: a small network inside every block (Houlsby et al. 2019, arXiv:1902.00751, figure 2).

    houlsby, pfeiffer   h ← h + s · W_up f(W_down h)        h what leaves attention or the feed-forward block, before the residual sum
    parallel            h ← h + s · W_up f(W_down x)        x what enters the feed-forward block (He et al. 2021, arXiv:2110.04366)

Houlsby's stand after attention and after the feed-forward block, Pfeiffer's (2020, arXiv:2005.00247) after the latter alone. W_up starts
at zero, so training starts from the base. f is no linear map: nothing here can be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Method, Mixture, Site, WeftError, base_class, features, is_linear
from weft.methods.blocks import role

_F: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Neck(Adapter):
    """Down (m, d), up (d, m), a bias for each, and a normalisation of what goes in if that was asked for."""

    def __init__(self, method: Bottleneck, layer: Site) -> None:
        super().__init__()
        self.how = method
        inside, outside = _widths(layer) or (0, 0)
        inside = inside if method.kind == "parallel" else outside
        size = max(1, inside // method.reduction)
        down = torch.empty(size, inside)
        self.down = nn.Parameter(down if down.is_meta else nn.init.kaiming_uniform_(down, a=sqrt(5)))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(outside, size))
        self.up_bias = nn.Parameter(torch.zeros(outside))
        self.gain = nn.Parameter(torch.ones(inside)) if method.layernorm else None
        self.shift = nn.Parameter(torch.zeros(inside)) if method.layernorm else None

    def more(self, x: Tensor) -> Tensor:
        """s · W_up f(W_down x)."""
        dtype = x.dtype
        if self.gain is not None and self.shift is not None:
            x = F.layer_norm(x.float(), self.gain.shape, self.gain.float(), self.shift.float()).to(dtype)
        z = _F[self.how.nonlinearity](F.linear(x, self.down.to(dtype), self.down_bias.to(dtype)))
        return self.how.scale * F.linear(z, self.up.to(dtype), self.up_bias.to(dtype))

    def forward(self, layer: Site | Around, *inputs: Any, **kwargs: Any) -> Any:
        y = layer.frozen(*inputs, **kwargs)
        return _with(y, _first(y) + self.more(self.source(_first(y), inputs, kwargs)))

    def source(self, h: Tensor, inputs: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """What goes into the network: the layer's output, or its input."""
        x: Tensor = h if self.how.kind != "parallel" else inputs[0] if inputs else kwargs["hidden_states"]
        return x.to(h.dtype)

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        """The layer once for all rows, and each adapter on its own rows."""
        y = layer.frozen(*inputs, **kwargs)
        h = out = _first(y)
        rows = mixture.owners(h)
        for i, adapter in enumerate(mixture.adapters):
            mine = (rows == i).nonzero().squeeze(1)
            if isinstance(adapter, Neck):
                out = out.index_add(0, mine, adapter.more(adapter.source(h, inputs, kwargs)[mine]))
        return _with(y, out)


def _first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]


def _with(y: Any, h: Tensor) -> Any:
    return (h, *y[1:]) if isinstance(y, tuple) else h


def _widths(layer: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer, or of a feed-forward block; None for anything else."""
    if is_linear(layer):
        return features(layer)
    if role("", layer) == "feedforward":  # a mixture of experts: as wide as what its router reads
        router = layer._modules.get("gate") or layer._modules["router"]
        return (int(next(p for p in router.parameters() if p.dim() == 2).shape[1]),) * 2
    parts = [m for m in layer._modules.values() if is_linear(m)]
    if len(parts) < 2 or any("att" in name.lower() for name in layer._modules):
        return None
    width = features(parts[0])[0]
    return (width, width) if features(parts[-1])[1] == width else None


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Bottleneck adapters.

    Args:
        targets: "auto": the places that `kind` means, in any family of transformers. Or names, of linear layers or feed-forward blocks.
        kind: "houlsby" (after attention and after the feed-forward block), "pfeiffer" (after the latter), or "parallel" (beside it).
        reduction: The width of a block over that of the bottleneck.
        nonlinearity: f: "relu", "gelu", "silu" or "tanh".
        scale: s.
        layernorm: Normalise what goes into the bottleneck, with a gain and shift of its own.
        train_norms: Train the base's normalisation layers too, as Houlsby et al. do.
    """

    targets: str | tuple[str, ...] = "auto"
    kind: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    reduction: int = 16
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    scale: float = 1.0
    layernorm: bool = False
    train_norms: bool = False

    mergeable: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-4  # of the three that Houlsby et al. search, 3e-5 to 3e-3
    site: ClassVar[str] = "linear layers and feed-forward blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [f"a reduction of {self.reduction}: it is at least 1"] if self.reduction < 1 else []
        if self.kind not in ("houlsby", "pfeiffer", "parallel"):
            wrong.append(f"kind={self.kind!r}: there are 'houlsby', 'pfeiffer' and 'parallel'")
        if self.nonlinearity not in _F:
            wrong.append(f"nonlinearity={self.nonlinearity!r}: there are {', '.join(_F)}")
        if wrong:
            raise WeftError("Bottleneck cannot be built with " + "; nor with ".join(wrong))

    def accepts(self, layer: nn.Module) -> bool:
        return _widths(layer) is not None

    def auto(self, able: Mapping[str, nn.Module], heads: Collection[str]) -> Collection[str]:
        wanted = ("attention", "feedforward") if self.kind == "houlsby" else ("feedforward",)
        found = [p for p, m in able.items() if role(p, m) in wanted]
        if self.kind != "parallel":
            return found
        blocks = {p if not is_linear(able[p]) else p.rpartition(".")[0] for p in found} & set(able)
        if found and not blocks:
            raise WeftError("kind='parallel' stands beside a feed-forward block, and here none is a module of its own: use 'pfeiffer'")
        return blocks

    def build(self, layer: Site, path: str) -> Adapter:
        return Neck(self, layer)

    def also(self, modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
        norms = {p: m for p, m in modules.items() if self.train_norms and "norm" in base_class(m).__name__.lower()}
        return {p: names for p, m in norms.items() if (names := tuple(n for n, q in m._parameters.items() if q is not None))}
