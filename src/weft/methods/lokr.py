"""LoKr: a Kronecker product (Yeh et al. 2023, LyCORIS, arXiv:2309.14859, section 3.2; Edalati et al. 2022, KronA, arXiv:2212.10650).

    ΔW = (α / r) W₁ ⊗ W₂        W₁ (a, c), W₂ (b, d) with out = a b and in = c d, as near to squares as can be

W₂ is a product of rank r where that is smaller, and so is W₁ if `decompose_both`. W₁ starts at zero, so training starts from the base.
W₁ ⊗ W₂ is never formed in a linear layer: with X the input x as (c, d), ΔW x is W₁ X W₂ᵀ as (a, b).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Site, WeftError, is_conv
from weft.methods.loha import LoHa, random_start
from weft.methods.updates import Update, core_shape, effective, shape_of, tucker


class Kronecker(Update):
    """ΔW of one layer; what is not factored is None."""

    w1: nn.Parameter | None
    w2: nn.Parameter | None

    def __init__(self, method: LoKr, layer: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, self.rank_dropout, self.module_dropout = scale, method.rank_dropout, method.module_dropout
        self.rescale = method.rank_dropout_scale
        out, inside, *kernel = shape_of(layer)
        (a, b), (c, d) = factors(out, method.decompose_factor), factors(inside, method.decompose_factor)
        thin1, thin2 = method.decompose_both and rank < max(a, c) / 2, rank < max(b, d) / 2
        cored = thin2 and effective(layer, method.use_effective_conv2d)
        self.w1 = None if thin1 else nn.Parameter(torch.zeros(a, c))
        self.w1_a = nn.Parameter(torch.zeros(a, rank)) if thin1 else None
        self.w1_b = random_start(rank, c) if thin1 else None
        self.w2 = None if thin2 else random_start(b, d, *kernel)
        self.w2_a = None if not thin2 else random_start(rank, b) if cored else random_start(b, rank)
        self.w2_b = None if not thin2 else random_start(rank, d if cored else d * prod(kernel))
        self.t2 = random_start(*core_shape(layer, rank)) if cored else None

    def halves(self) -> tuple[Tensor, Tensor]:
        """W₁ (a, c) and W₂ (b, d · kernel)."""
        one = self.w1 if self.w1 is not None else self.w1_a @ self.w1_b  # type: ignore[operator]
        if self.w2 is not None:
            return one, self.w2.flatten(1)
        assert self.w2_a is not None and self.w2_b is not None
        return one, self.w2_a @ self.w2_b if self.t2 is None else tucker(self.t2, self.w2_a, self.w2_b).flatten(1)

    def delta(self, layer: Any) -> Tensor:
        one, two = self.halves()
        if self.w2 is not None and self.w2.dim() == 3:
            two = self.w2  # peft's Kronecker product for Conv1d pairs W₁'s columns with the kernel: files mean that function
        return self.scale * torch.kron(one, two).reshape(shape_of(layer))

    def act(self, layer: Any, x: Tensor) -> Tensor:
        if is_conv(layer):
            return super().act(layer, x)
        one, two = (w.to(x.dtype) for w in self.halves())
        X = F.linear(x.reshape(*x.shape[:-1], one.shape[1], two.shape[1]), two)  # (..., c, b)
        return self.scale * (one @ X).flatten(-2)


def factors(n: int, most: int = -1) -> tuple[int, int]:
    """n as a product of two numbers: `most` first if it divides n, else the smaller first and near to a square, at most `most`."""
    if most > 0 and n % most == 0:
        return most, n // most
    small = max(m for m in range(1, isqrt(n) + 1) if n % m == 0 and (most == -1 or m <= most))
    return small, n // small


@dataclass(frozen=True, kw_only=True)
class LoKr(LoHa):
    """Low-rank Kronecker product.

    Args:
        decompose_both: W₁ too is a product of rank r, where that is smaller.
        decompose_factor: The size of W₁, where it divides the layer's; -1 for as near to squares as can be.
        rank_dropout_scale: What rank_dropout leaves is scaled up to keep the mean.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    default_lr: ClassVar[float] = 1e-3  # W₁ is shared by all blocks of ΔW and starts at zero

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise WeftError(f"LoKr cannot be built with a decompose_factor of {self.decompose_factor}: it is at least 1, or -1 for squares")

    __hash__ = LoHa.__hash__

    def build(self, layer: Site, path: str) -> Adapter:
        return Kronecker(self, layer, *self.scaled(path))
