"""Training in a random subspace (Li et al. 2018, arXiv:1804.08838; Aghajanyan et al. 2020, arXiv:2012.13255): the intrinsic dimension.

    θ = θ₀ + P θ_d            P (D, d) random and never trained, with columns of length one; θ_d starts at zero (DID)
    θᵢ = θ₀ᵢ + λᵢ (P θ_d)ᵢ    with one trained scale for every matrix, so d - m numbers are left for θ_d (structure-aware, SAID)

P is a dense Gaussian while D is below 10⁵, and above that Fastfood (Le et al. 2013): H G Π H B, with H a Walsh-Hadamard transform, G
Gaussian, Π a permutation and B of ±1, which costs O(D log D) time and O(D) memory. Seed and dimension alone rebuild it: the file holds
θ_d and λ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.core import Adapter, Method, Site, WeftError, is_conv, is_linear
from weft.kernels.hadamard import hadamard
from weft.methods.updates import Update, shape_of


class _Fastfood(torch.autograd.Function):
    """θ ↦ (H G Π H B θ)[:rows]; backward is the transpose, B H Πᵀ G H, so that nothing but P itself is kept."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(signs, order, gauss)
        ctx.dimension = len(theta)
        return fastfood_reference(theta, signs, order, gauss, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        signs, order, gauss = ctx.saved_tensors
        g = hadamard(torch.cat([g, g.new_zeros(len(signs) - len(g))])) * gauss
        back = torch.empty_like(g)
        back[order] = g
        return (hadamard(back) * signs)[: ctx.dimension], None, None, None, None


def fastfood_reference(theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor, rows: int) -> Tensor:
    """The same in plain operations, differentiated by autograd."""
    x = torch.cat([theta, theta.new_zeros(len(signs) - len(theta))])
    return hadamard(hadamard(x * signs)[order] * gauss)[:rows]


def fastfood(theta: Tensor, signs: Tensor, order: Tensor, gauss: Tensor, rows: int) -> Tensor:
    """(rows,) from θ (d,), with signs, order and gauss (n,), n a power of two and at least both."""
    if torch.compiler.is_compiling():
        return fastfood_reference(theta, signs, order, gauss, rows)
    return _Fastfood.apply(theta, signs, order, gauss, rows)  # type: ignore[no-any-return, no-untyped-call]


class Projected(Update):
    """ΔW of one layer: its rows of P θ_d. P is in buffers that move with the adapter and are in no file."""

    P: Tensor | None
    signs: Tensor
    order: Tensor
    gauss: Tensor

    def __init__(self, layer: Site, theta: nn.Parameter, seed: int, total: int, fast: bool, scaled: bool) -> None:
        super().__init__()
        rows, g = prod(shape_of(layer)), torch.Generator("cpu").manual_seed(seed)
        self.theta = theta
        self.scale = nn.Parameter(torch.ones(1)) if scaled else None
        made: dict[str, Tensor | None] = {"P": None, "signs": None, "order": None, "gauss": None}
        with torch.device("cpu"):  # under torch.device("meta") too: what is loaded brings no P along
            if fast:
                n = power_of_two(max(rows, len(theta)))
                gauss = torch.randn(n, generator=g)
                # a column of HGΠHB has the squared length n ‖G‖², of which a layer keeps rows / n; over all layers it becomes one
                made["gauss"] = gauss / (gauss.square().sum() * total).sqrt()
                made["order"], made["signs"] = torch.randperm(n, generator=g), torch.randint(0, 2, (n,), generator=g) * 2.0 - 1.0
            else:
                made["P"] = torch.randn(rows, len(theta), generator=g) / total**0.5
        for name, value in made.items():
            self.register_buffer(name, value, persistent=False)

    def delta(self, layer: Any) -> Tensor:
        shape = shape_of(layer)
        if self.P is not None:
            flat = self.P @ self.theta
        else:
            flat = fastfood(self.theta, self.signs, self.order, self.gauss, prod(shape))
        return (flat if self.scale is None else flat * self.scale).view(shape)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, kw_only=True)
class Subspace(Method):
    """Trains d numbers for the whole model, in a random subspace of its weights.

    Args:
        dimension: d, all trained numbers together.
        seed: What P is made of.
        structure_aware: SAID: one of the d numbers for every matrix is its scale.
        dense_below: P is a dense matrix while the adapted weights number less than this.
    """

    dimension: int = 200
    seed: int = 0
    structure_aware: bool = False
    dense_below: int = 100_000

    default_lr: ClassVar[float] = 1e-2  # columns of P have length one, so a step in θ_d moves each weight by 1/√D of it
    site: ClassVar[str] = "linear layers, transformers' Conv1D and convolutions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimension < 1:
            raise WeftError(f"Subspace cannot be built with a dimension of {self.dimension}: it is at least 1")

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer) or is_conv(layer)

    def build(self, layer: Site, path: str) -> Adapter:
        return self.build_all({path: layer})[path]

    def build_all(self, layers: Mapping[str, Site]) -> dict[str, Adapter]:
        left = self.dimension - (len(layers) if self.structure_aware else 0)
        if left < 1:
            raise WeftError(f"a dimension of {self.dimension} leaves nothing beside the scales of {len(layers)} matrices: raise it")
        theta, total = nn.Parameter(torch.zeros(left)), sum(prod(shape_of(m)) for m in layers.values())
        fast, scaled = total >= self.dense_below, self.structure_aware
        return {p: Projected(m, theta, self.seed * 1_000_003 + i, total, fast, scaled) for i, (p, m) in enumerate(layers.items())}
