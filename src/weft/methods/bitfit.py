"""BitFit: only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199).

    h = W₀x + b        b trained, W₀ frozen; b starts as the base's own

Models of the Llama kind have no biases. There is nothing to train in them, and that is an error; `add=True` gives every target layer
without a bias a trained one that starts at zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.core import Adapter, Around, Method, Mixture, Replaced, Site, features, is_conv, is_linear, plain
from weft.methods.blocks import channels_second, spread, table


class Bias(Adapter):
    """h = layer(x) + (b - b₀), where b (out,) is the trained bias whole and b₀ the base's (zero if it has none)."""

    def __init__(self, layer: Site) -> None:
        super().__init__()
        own: Any = getattr(layer, "bias", None)
        self.bias = nn.Parameter(torch.zeros(features(layer)[1] if own is None else own.shape))  # fp32, and on "meta" under that device
        if own is not None and not self.bias.is_meta:
            self.bias.data.copy_(own.detach())

    def shift(self, layer: Any) -> Tensor:
        """b - b₀."""
        return self.bias if layer.bias is None else self.bias - layer.bias

    def forward(self, layer: Site | Around, *inputs: Any) -> Tensor:
        module, y = plain(layer), layer.frozen(*inputs)
        return y + spread(module, self.shift(module), y).to(y.dtype)  # type: ignore[no-any-return]

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        return {"bias": self.bias.detach()}

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        """One sum for all rows."""
        y, many = layer.frozen(*inputs, **kwargs), mixture.adapters
        shifts = [a.shift(layer) for a in many if isinstance(a, Bias)]
        return y + spread(layer, table(mixture, mixture.owners(y), shifts, torch.zeros_like(shifts[0])), y).to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Trains biases.

    Args:
        targets: "auto": everything that has a bias, and with `add` also every linear layer but the output head. Or names.
        add: Give target layers without a bias a trained one.
    """

    targets: str | tuple[str, ...] = "auto"
    add: bool = False

    default_lr: ClassVar[float] = 1e-3  # Ben Zaken et al. search 1e-4 to 1e-3: biases want larger steps than weights
    site: ClassVar[str] = "layers that have a bias, and with add=True linear layers and convolutions without, which get a trained one"

    def accepts(self, layer: nn.Module) -> bool:
        return layer._parameters.get("bias") is not None or (self.add and (is_linear(layer) or is_conv(layer)))

    def auto(self, able: Mapping[str, nn.Module], heads: Collection[str]) -> Collection[str]:
        return [p for p, m in able.items() if m._parameters.get("bias") is not None or (is_linear(m) and p not in heads)]

    def build(self, layer: Site, path: str) -> Adapter:
        known = is_linear(layer) or isinstance(layer, nn.LayerNorm) or channels_second(layer)
        return Bias(layer) if known else Replaced(layer, ["bias"])  # anything else is computed with its bias replaced

    def build_all(self, layers: Mapping[str, Site]) -> dict[str, Adapter]:
        built = {path: self.build(layer, path) for path, layer in layers.items()}
        seen: dict[int, nn.Parameter] = {}
        for path, adapter in built.items():  # a bias that two modules share stays shared (BERT's decoder and its prediction head)
            own = layers[path].__dict__["_parameters"].get("bias")
            if own is not None:
                adapter._parameters["bias"] = seen.setdefault(id(own), adapter._parameters["bias"])  # type: ignore[arg-type]
        return built
