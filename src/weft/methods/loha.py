"""LoHa: a Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098, eq. 2; LyCORIS, arXiv:2309.14859).

    ΔW = (α / r) (A₁ B₁) ∘ (A₂ B₂)        A (out, r), B (r, in): a rank of up to r² with 2 r (in + out) numbers

B₂ starts at zero, so training starts from the base. A convolution is flattened to (out, in · kernel), or, with `use_effective_conv2d`, each
factor is a Tucker product of a core (r, r, *kernel) with A (r, out) and B (r, in) (FedPara, proposition 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.core import Adapter, Method, Site, WeftError, by_pattern, is_conv, is_linear
from weft.methods.updates import Update, core_shape, effective, shape_of, tucker


class Hadamard(Update):
    """ΔW of one layer."""

    def __init__(self, method: LoHa, layer: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, self.rank_dropout, self.module_dropout = scale, method.rank_dropout, method.module_dropout
        out, inside, *kernel = shape_of(layer)
        cored = effective(layer, method.use_effective_conv2d)
        inside = inside if cored else inside * prod(kernel)
        a = (rank, out) if cored else (out, rank)
        self.t1 = random_start(*core_shape(layer, rank)) if cored else None
        self.a1, self.b1 = random_start(*a), random_start(rank, inside)
        self.t2 = random_start(*core_shape(layer, rank)) if cored else None
        self.a2, self.b2 = random_start(*a), nn.Parameter(torch.zeros(rank, inside))

    def delta(self, layer: Any) -> Tensor:
        if self.t1 is None or self.t2 is None:
            W = (self.a1 @ self.b1) * (self.a2 @ self.b2)
        else:
            W = tucker(self.t1, self.a1, self.b1) * tucker(self.t2, self.a2, self.b2)
        return self.scale * W.reshape(shape_of(layer))


def random_start(*shape: int) -> nn.Parameter:
    p = torch.empty(*shape)
    return nn.Parameter(p if p.is_meta else nn.init.kaiming_uniform_(p, a=sqrt(5)))


@dataclass(frozen=True, kw_only=True)
class LoHa(Method):
    """Low-rank Hadamard product.

    Args:
        rank: r; the rank of the update is up to r².
        alpha: The update is scaled by alpha / rank.
        rank_dropout: Probability of dropping a row of the update while training.
        module_dropout: Probability of dropping a layer's whole update while training.
        use_effective_conv2d: Convolutions with a kernel get a core of their own (FedPara, proposition 3) instead of being flattened.
        rank_pattern: Other ranks for some layers: regular expression for the end of the path -> rank; the first match counts.
        alpha_pattern: Other alphas, in the same way.
    """

    rank: int = 8
    alpha: float = 8.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    default_lr: ClassVar[float] = 2e-4
    site: ClassVar[str] = "linear layers, transformers' Conv1D and convolutions"

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [f"a rank of {r}: a rank is a whole number of at least 1" for r in (self.rank, *self.rank_pattern.values()) if r < 1]
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"a {name} of {getattr(self, name)}: a probability is at least 0 and below 1")
        if wrong:
            raise WeftError(f"{type(self).__name__} cannot be built with " + "; nor with ".join(wrong))

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer) or is_conv(layer)

    def scaled(self, path: str) -> tuple[int, float]:
        """(rank, scale) of the layer at this path."""
        rank: int = by_pattern(self.rank_pattern, path, self.rank)
        return rank, by_pattern(self.alpha_pattern, path, self.alpha) / rank

    def build(self, layer: Site, path: str) -> Adapter:
        return Hadamard(self, layer, *self.scaled(path))
