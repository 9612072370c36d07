"""(IA)³: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638, eq. 1 and section 3.3).

    softmax(Q (l_k ⊙ K)ᵀ / √d) (l_v ⊙ V)        keys and values:  y = l ⊙ (W₀x + b)
    (l_ff ⊙ γ(W₁x)) W₂                          feed-forward:     y = W₀(l ⊙ x) + b

l starts at one, so training starts from the base. Merged: W = diag(l) W₀ and l ⊙ b, or W = W₀ diag(l). Several active ones multiply.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.core import Adapter, Around, Method, Mixture, Site, features, is_conv, is_conv1d, is_linear, matcher, plain, several
from weft.methods.blocks import role, spread, table
from weft.quant import dense


class OutputScale(Adapter):
    """y = l ⊙ layer(x), with l (out, 1), or (1, out, 1, ...) for a convolution."""

    def __init__(self, layer: Site) -> None:
        super().__init__()
        out = features(layer)[1]
        self.l = nn.Parameter(torch.ones(1, out, *_ones(layer)) if is_conv(layer) else torch.ones(out, 1))

    def forward(self, layer: Site | Around, *inputs: Any) -> Tensor:
        y: Tensor = layer.frozen(*inputs)
        return (y * spread(plain(layer), self.l.flatten(), y)).to(y.dtype)  # the product in fp32, rounded once

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module, s = plain(layer), self.l.detach().flatten()
        W = dense(module).float()
        new = {"weight": W * s if is_conv1d(module) else W * s.view(-1, *(1 for _ in W.shape[1:]))}
        return new if module.bias is None else new | {"bias": module.bias.detach().float() * s}

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        """One product for all rows."""
        y = layer.frozen(*inputs, **kwargs)
        return (y * spread(layer, _rows(mixture, y), y)).to(y.dtype)


class InputScale(Adapter):
    """y = layer(l ⊙ x), with l (1, in), or (1, in, 1, ...) for a convolution."""

    def __init__(self, layer: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(1, features(layer)[0], *(_ones(layer) if is_conv(layer) else ())))

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        y: Tensor = layer.frozen((x * spread(plain(layer), self.l.flatten(), x)).to(x.dtype))
        return y

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module, s = plain(layer), self.l.detach().flatten()
        W = dense(module).float()
        if is_conv1d(module):
            return {"weight": W * s[:, None]}
        if not is_conv(module):
            return {"weight": W * s}
        each = s.view(module.groups, -1).repeat_interleave(W.shape[0] // module.groups, 0)  # each group of outputs sees its own inputs
        return {"weight": W * each.view(*W.shape[:2], *(1 for _ in W.shape[2:]))}

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        """One product for all rows."""
        (x,) = inputs
        return layer.frozen((x * spread(layer, _rows(mixture, x), x)).to(x.dtype), **kwargs)


def _ones(layer: Any) -> tuple[int, ...]:
    return (1,) * len(layer.kernel_size)


def _rows(mixture: Mixture, x: Tensor) -> Tensor:
    vectors = [a._parameters["l"].flatten() for a in mixture.adapters]  # type: ignore[union-attr]
    return table(mixture, mixture.owners(x), vectors, torch.ones_like(vectors[0]))


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """(IA)³: one trained factor for every key, value and inner activation of the feed-forward blocks.

    Args:
        targets: "auto": keys and values (or the fused layer that makes them), and what leaves the feed-forward blocks. Or names.
        feedforward: Which of the targets are scaled at their input: "auto" (what leaves a feed-forward block), or names. () for none.
    """

    targets: str | tuple[str, ...] = "auto"
    feedforward: str | tuple[str, ...] = "auto"

    default_lr: ClassVar[float] = 3e-3  # that of Liu et al. 2022
    site: ClassVar[str] = "linear layers, transformers' Conv1D and convolutions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.feedforward, str):
            object.__setattr__(self, "feedforward", tuple(self.feedforward))

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer) or is_conv(layer)

    def auto(self, able: Mapping[str, nn.Module], heads: Collection[str]) -> Collection[str]:
        return [p for p, m in able.items() if role(p, m) in ("key", "value", "fused", "feedforward")]

    def build(self, layer: Site, path: str) -> Adapter:
        return (InputScale if self.scales_input(path, layer) else OutputScale)(layer)

    def scales_input(self, path: str, layer: Any) -> bool:
        """Whether the layer at this path is scaled at its input."""
        if self.feedforward == "auto":
            return role(path, layer) == "feedforward"
        return any(matcher(name)(path) for name in several(self.feedforward))
