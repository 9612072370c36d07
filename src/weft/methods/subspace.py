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
from weft.kernels.hadamard import hadamard, power_of_two
from weft.methods.kept import Kept, written
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
    """ΔW of one layer: its rows of P θ_d. P is where θ_d is and in no file; a copy, and what is loaded, makes it anew."""

    def __init__(self, layer: Site, theta: nn.Parameter, seed: int, total: int, fast: bool, scaled: bool) -> None:
        super().__init__()
        self.shape, self.seed, self.total, self.fast = shape_of(layer), seed, total, fast
        self.theta = theta
        self.scale = nn.Parameter(torch.ones(1)) if scaled else None
        self.kept = Kept()
        self.ready()

    def ready(self) -> None:
        place = self.theta.device
        if place.type != "meta" and self.kept.get("place") != place:
            self.kept.update(P=tuple(t.to(place) for t in self.kept.get("P") or self.made()), place=place)

    def _apply(self, fn: Any, recurse: bool = True) -> Projected:
        moved: Projected = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.ready()
        return moved

    def made(self) -> tuple[Tensor, ...]:
        """(P,) with P (rows, d), or (signs, order, gauss), each (n,); on the CPU, so that a seed means the same everywhere."""
        rows, d = prod(self.shape), len(self.theta)
        how: Any = dict(generator=torch.Generator("cpu").manual_seed(self.seed), device="cpu")
        if not self.fast:
            return (torch.randn(rows, d, **how) / self.total**0.5,)
        n = power_of_two(max(rows, d))
        gauss = torch.randn(n, **how)
        # a column of HGΠHB has the squared length n ‖G‖², of which a layer keeps rows / n; over all layers it becomes one
        gauss = gauss / (gauss.square().sum() * self.total).sqrt()
        order = torch.randperm(n, **how)
        return torch.randint(0, 2, (n,), **how) * 2.0 - 1.0, order, gauss

    def delta(self, layer: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            self.ready()
        theta, (first, *rest) = self.theta.float(), self.kept["P"]
        flat = fastfood(theta, first, rest[0], rest[1], prod(self.shape)) if self.fast else first @ theta
        return (flat if self.scale is None else flat * self.scale).view(self.shape)

    def rounded(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """In evaluation ΔW is kept for as long as nobody writes to θ_d and λ; training lets go of it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.theta.is_inference():
            if not torch.compiler.is_compiling():
                self.kept.update(of=None, state=None, update=None)
            return super().rounded(layer, dtype)
        own = [p.detach() for p in self._parameters.values() if p is not None]  # held, so that their places stay theirs
        if self.kept.get("state") != (state := (dtype, *written(own))):
            self.kept.update(of=own, state=state, update=super().rounded(layer, dtype))
        return self.kept["update"]  # type: ignore[no-any-return]


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
