"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv:2402.09353).

    h = c (W₀ + s B A) x + b,   c = m / ‖W₀ + s B A‖        a norm and a trained magnitude m for each output; m = ‖W₀‖ at the start

The norm is a constant to the gradient (section 4.3 of the paper). W₀ + sBA is never formed, since for each output o

    ‖W₀ + sBA‖²ₒ = ‖W₀‖²ₒ + 2s Σᵣ (W₀Aᵀ)ₒᵣ Bₒᵣ + s² (B (AAᵀ) Bᵀ)ₒₒ

where ‖W₀‖² is found once, and W₀Aᵀ is the frozen layer applied to the rows of A, so that packed weights will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Site, WeftError, features, is_conv, is_conv1d, plain, unmerged
from weft.methods.kept import Kept, written
from weft.methods.lora import LoRA
from weft.methods.lora_layers import LowRankConv, LowRankEmbedding
from weft.methods.lora_linear import Factors, LowRank
from weft.quant import dense


class Decomposed(Factors):
    """Magnitude and direction, for whatever kind of LoRA stands behind this class."""

    def __init__(self, method: LoRA, layer: Site, rank: int, scale: float) -> None:
        super().__init__(method, layer, rank, scale)
        self.kept = Kept()
        m = self.B.new_empty(features(layer)[1]) if self.B.is_meta else self.measured(layer).sqrt().cpu()
        self.m = nn.Parameter(self.along(m)[None] if is_conv(layer) else m)

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        base = unmerged(layer)
        y: Tensor = layer.frozen(x)
        drop = self.training and self.dropout > 0
        if base is layer and not drop:
            return self.turned(base, y, x)
        x = F.dropout(x, self.dropout) if drop else x  # as in peft, the base that is rescaled sees the dropped input too
        alone: Tensor = base.frozen(x)
        return y + (self.turned(base, alone, x) - alone)  # beside other adapters it adds its own change of the base

    def turned(self, base: Any, y: Tensor, x: Tensor) -> Tensor:
        """c (W₀ + sBA) x + b from y = W₀x + b."""
        c, shift, B = self.factors(base)
        y = (y * c if shift is None else torch.addcmul(shift, y, c) if y.dtype == c.dtype else y * c + shift).to(y.dtype)
        return self.update(base, y, x, B)

    def factors(self, base: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """c and b - c b₀ in fp32, and c B. In evaluation they are kept for as long as nobody writes to the adapter or to the base."""
        keep = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.A.is_inference())
        state = (_state(self), _state(base)) if keep else None
        if keep and self.kept.get("state") == state:
            return self.kept["factors"]  # type: ignore[no-any-return]
        c = self.m.flatten() / self.norm(base)
        b = getattr(base, "bias", None)
        shift = None if b is None else self.along((b if self.bias is None else self.bias) - c * b)
        made = self.along(c), shift, rows_of(self.B, c).to(self.B.dtype)
        if not torch.compiler.is_compiling():
            self.kept.update(state=state, factors=made if keep else None)
        return made

    @torch.no_grad()
    def norm(self, base: Any) -> Tensor:
        """(out,) ‖W₀ + sBA‖ in fp32."""
        A, B, s = self.A.flatten(1), self.B.flatten(1), self.scale
        cross, square = (self.onto(base) * B).sum(1), ((B @ (A @ A.T)) * B).sum(1)
        return (self.squares(base) + 2 * s * cross + s * s * square).clamp_min(1e-30).sqrt()

    def squares(self, base: Any) -> Tensor:
        """(out,) ‖W₀‖², kept for as long as the base's weight is the same tensor, unwritten."""
        if torch.compiler.is_compiling():
            return self.kept["squares"] if "squares" in self.kept else self.measured(base)
        if self.kept.get("of") != (of := _state(base)):
            self.kept.update(of=of, squares=self.measured(base))
        return self.kept["squares"]  # type: ignore[no-any-return]

    def measured(self, base: Any) -> Tensor:
        W: Tensor = dense(base)
        over = [0] if transposed(base) else list(range(1, W.dim()))
        return torch.linalg.vector_norm(W, dim=over, dtype=torch.float32).square()  # type: ignore[no-any-return]

    def onto(self, base: Any) -> Tensor:
        """(out, rank) W₀Aᵀ."""
        W: Tensor = dense(base)
        return (W.T if transposed(base) else W.flatten(1)).to(self.A.dtype) @ self.A.flatten(1).T

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module, base = plain(layer), unmerged(layer)
        W, c = super().merged(base)["weight"], (self.m.flatten() / self.norm(base)).detach()
        W = W * c if transposed(base) else rows_of(W, c)
        if module is not base and module.weight is not base.weight:  # others were folded in before: this one adds its own change
            W = W + dense(module).float() - dense(base).float()
        return {"weight": W} | self.merged_bias(layer)


def transposed(base: Any) -> bool:
    """Whether the weight lies as (in, out)."""
    return isinstance(base, nn.Embedding) or is_conv1d(base)


def rows_of(t: Tensor, c: Tensor) -> Tensor:
    """Each t[i] times c[i]."""
    return t * c.view(-1, *(1 for _ in t.shape[1:]))


def _state(module: nn.Module) -> tuple[tuple[int, int], ...]:
    return written((*module._parameters.values(), *module._buffers.values()))


class DecomposedLinear(Decomposed, LowRank):
    """DoRA on a linear layer."""

    def onto(self, base: Any) -> Tensor:
        A = self.A.to(base.weight.dtype) if base.weight.is_floating_point() else self.A
        return (base.frozen(A) - (0 if base.bias is None else base.bias)).T.float()  # type: ignore[no-any-return]


class DecomposedEmbedding(Decomposed, LowRankEmbedding):
    """DoRA on an embedding: one norm for each dimension, over the vocabulary."""


class DecomposedConv(Decomposed, LowRankConv):
    """DoRA on a convolution."""


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: LoRA's hyper-parameters, and a trained magnitude for every output."""

    def kind(self, layer: object) -> type[Factors]:
        return DecomposedEmbedding if isinstance(layer, nn.Embedding) else DecomposedConv if is_conv(layer) else DecomposedLinear

    def build(self, layer: Site, path: str) -> Adapter:
        if self.lora_bias or self.from_base:
            raise WeftError(f"{'lora_bias' if self.lora_bias else self.init} with DoRA: its equation has no place for it; use weft.LoRA")
        if is_conv(layer) and plain(layer).groups > 1:
            raise WeftError(f"{path}: DoRA on a convolution with groups has no norm per output; exclude={path!r} leaves it out")
        return super().build(layer, path)
