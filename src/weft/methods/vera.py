"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al. 2023, arXiv:2310.11454).

    h = W₀x + λ_b ⊙ B (λ_d ⊙ A x)        A ∈ ℝ^{r × in}, B ∈ ℝ^{out × r} random, frozen, and shared by all layers; λ_b = 0 at the start

A and B have the sizes of the largest layer, and each layer takes the part that it needs. They come from a seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Method, Site, WeftError, features, is_conv1d, is_linear, plain
from weft.quant import dense


class Projection:
    """A (rank, largest in) and B (largest out, rank), made on the CPU, with one copy on each device that asks."""

    def __init__(self, seed: int, rank: int, inside: int, outside: int) -> None:
        self.seed, self.shapes = seed, ((rank, inside), (outside, rank))
        self.copies: dict[str, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        place = str(device)
        if place not in self.copies:
            A, B = self.copies.get("cpu") or self.made()
            self.copies[place] = A.to(device), B.to(device)
        return self.copies[place]

    def made(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        bounds = [sqrt(3.0) * (sqrt(2) / sqrt(shape[1])) for shape in self.shapes]  # Kaiming's uniform for a fan of the second axis
        A, B = (torch.empty(s, device="cpu").uniform_(-b, b, generator=generator) for s, b in zip(self.shapes, bounds, strict=True))
        return A, B


class Vectors(Adapter):
    """λ_d (rank,) and λ_b (out,) of one layer."""

    def __init__(self, method: VeRA, layer: Site, shared: Projection) -> None:
        super().__init__()
        self.shared, self.dropout = shared, method.dropout
        self.d = nn.Parameter(torch.full((method.rank,), method.d_initial))
        self.b = nn.Parameter(torch.zeros(features(layer)[1]))
        self.ready()

    def ready(self) -> None:
        """Have the matrices where the vectors are: a compiled forward finds them there, and never makes them."""
        if not self.d.is_meta:
            self.shared.on(self.d.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Vectors:
        moved: Vectors = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.ready()
        return moved

    def slices(self, layer: Any) -> tuple[Tensor, Tensor]:
        """(rank, in) and (out, rank) of this layer."""
        (inside, outside), (A, B) = features(layer), self.shared.on(self.d.device)
        return A[:, :inside], B[:outside]

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        y: Tensor = layer.frozen(x)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        (A, B), to = self.slices(plain(layer)), y.dtype
        return y + self.b.to(to) * F.linear(self.d.to(to) * F.linear(x.to(to), A.to(to)), B.to(to))

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module = plain(layer)
        A, B = self.slices(module)
        update = (self.b[:, None] * B) @ (self.d[:, None] * A)
        return {"weight": (dense(module).float() + (update.T if is_conv1d(module) else update)).detach()}


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Trains two vectors a layer around random matrices that all layers share.

    Args:
        rank: r, the rows of A. Large ranks cost no parameters but r a layer, and time.
        dropout: Probability of dropping an input of A while training.
        d_initial: What λ_d starts from (0.1 in the paper).
        seed: What A and B are made from.
        save_projection: Store A and B in the file too, so that it does not depend on torch's random numbers staying what they are.
    """

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    seed: int = 0
    save_projection: bool = True

    default_lr: ClassVar[float] = 1e-3  # that of peft's comparison of methods; the paper too trains with larger rates than LoRA's
    site: ClassVar[str] = "linear layers and transformers' Conv1D"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise WeftError(f"VeRA cannot be built with a rank of {self.rank}: a rank is a whole number of at least 1")

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer)

    def build(self, layer: Site, path: str) -> Adapter:
        return self.build_all({path: layer})[path]

    def build_all(self, layers: Mapping[str, Site]) -> dict[str, Adapter]:
        sizes = [features(layer) for layer in layers.values()]
        shared = Projection(self.seed, self.rank, max(i for i, _ in sizes), max(o for _, o in sizes))
        return {path: Vectors(self, layer, shared) for path, layer in layers.items()}
