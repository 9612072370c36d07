"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

    h = W₀x + (α / r) · B A x        A ∈ ℝ^{r × in}, B ∈ ℝ^{out × r}; B = 0 at the start, so h = W₀x

with rsLoRA's scale α / √r (Kalajdzievski 2023, arXiv:2312.03732) and LoRA+'s faster B (Hayou et al. 2024, arXiv:2402.12354).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Method, Mixture, Site, WeftError, features, is_conv, is_conv1d, is_linear, plain
from weft.kernels.low_rank import low_rank_add
from weft.methods.lora_layers import LowRankConv, LowRankEmbedding, stacked
from weft.quant import dense


class LowRank(Adapter):
    """The update of a linear layer."""

    def __init__(self, method: LoRA, layer: Site, rank: int, scale: float) -> None:
        super().__init__()
        inside, outside = features(layer)
        self.scale, self.dropout = scale, method.dropout
        self.A = method.first(torch.empty(rank, inside))
        self.B = nn.Parameter(torch.zeros(outside, rank))
        self.b = nn.Parameter(torch.zeros(outside)) if method.lora_bias else None
        own: Tensor | None = getattr(layer, "bias", None) if method.bias != "none" else None
        self.bias = None if own is None else nn.Parameter(own.detach().to("cpu" if not own.is_meta else "meta", torch.float32, copy=True))

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        y: Tensor = layer.frozen(x)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        y = low_rank_add(y, x, self.A, self.B, self.scale)
        if self.b is not None:
            y = y + (self.scale * self.b).to(y.dtype)
        if self.bias is not None:
            y = y + (self.bias - plain(layer).bias).to(y.dtype)
        return y

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module: Any = plain(layer)
        W, A, B = dense(module).float(), self.A.detach(), self.B.detach()
        new = {"weight": torch.addmm(W, A.T, B.T, alpha=self.scale) if is_conv1d(module) else torch.addmm(W, B, A, alpha=self.scale)}
        if self.b is not None or self.bias is not None:
            bias = self.bias if self.bias is not None else module.bias.float() if module.bias is not None else torch.zeros_like(B[:, 0])
            new["bias"] = (bias + self.scale * self.b if self.b is not None else bias).detach()
        return new

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        """One batched product for all rows: row i meets its own A and B, padded with zeros to the largest rank."""
        if not mixture.cache.setdefault("alike", all(map(_only_factors, mixture.adapters))):
            return super().mixed(mixture, layer, *inputs, **kwargs)
        (x,) = inputs
        rows, y = mixture.owners(x), layer.frozen(x)
        A, B = stacked(mixture, rows, y.dtype)
        S = torch.bmm(x.reshape(len(rows), -1, x.shape[-1]).to(y.dtype), A)
        return torch.baddbmm(y.view(len(rows), -1, y.shape[-1]), S, B).view(y.shape)


def _only_factors(adapter: Any) -> bool:
    return adapter.b is None and adapter.bias is None and not adapter.dropout


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation.

    Args:
        rank: r, the columns of B and rows of A. What a layer can learn grows with it; so does the file.
        alpha: The update is scaled by alpha / rank, so that one learning rate serves every rank.
        dropout: Probability of dropping an input of A while training.
        rslora: Scale by alpha / sqrt(rank) instead; for ranks of 64 and more.
        lr_ratio: LoRA+: B learns this many times as fast as A (the paper suggests 16).
        init: How A starts: "kaiming" (uniform in ±1/√in) or "gaussian" (standard deviation 1 / rank). B starts at zero.
        bias: Train biases of the base too: "none", "lora_only" (those of the targets) or "all".
        lora_bias: Give B a bias of its own.
        rank_pattern: Other ranks for some layers: regular expression for the end of the path -> rank; the first match counts.
        alpha_pattern: Other alphas, in the same way.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    lr_ratio: float = 1.0
    init: Literal["kaiming", "gaussian"] = "kaiming"
    bias: Literal["none", "lora_only", "all"] = "none"
    lora_bias: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    default_lr: ClassVar[float] = 2e-4  # Dettmers et al. 2023; Biderman et al. 2024 find 2e-4 to 5e-4 best
    site: ClassVar[str] = "linear layers, transformers' Conv1D, embeddings and convolutions"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = [self.rank, *self.rank_pattern.values()]
        wrong = [f"a rank of {r}: a rank is a whole number of at least 1" for r in ranks if not isinstance(r, int) or r < 1]
        if not 0 <= self.dropout < 1:
            wrong.append(f"a dropout of {self.dropout}: a probability is at least 0 and below 1")
        if wrong:
            raise WeftError("LoRA cannot be built with " + "; nor with ".join(wrong))

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer) or isinstance(layer, nn.Embedding) or is_conv(layer)

    def scaled(self, path: str) -> tuple[int, float]:
        """(rank, scale) of the layer at this path."""
        rank, alpha = _pattern(self.rank_pattern, path, self.rank), _pattern(self.alpha_pattern, path, self.alpha)
        return rank, alpha / (sqrt(rank) if self.rslora else rank)

    def first(self, A: Tensor) -> nn.Parameter:
        """A as it starts: (rank, in, ...)."""
        if A.is_meta:
            return nn.Parameter(A)
        if self.init == "gaussian":
            return nn.Parameter(nn.init.normal_(A, std=1 / A.shape[0]))
        return nn.Parameter(nn.init.kaiming_uniform_(A, a=sqrt(5)))

    def build(self, layer: Site, path: str) -> Adapter:
        kind = LowRankEmbedding if isinstance(layer, nn.Embedding) else LowRankConv if is_conv(layer) else LowRank
        return kind(self, layer, *self.scaled(path))

    def also(self, modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
        if self.bias != "all":
            return {}
        return {p: ("bias",) for p, m in modules.items() if p not in targets and m._parameters.get("bias") is not None}

    def lr_scale(self, parameter: str) -> float:
        return self.lr_ratio if parameter.rpartition(".")[2] == "B" else 1.0


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", path)), default)
