"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

    h = W₀x + (α / r) · B A x        A ∈ ℝ^{r × in}, B ∈ ℝ^{out × r}; B = 0 at the start, so h = W₀x

with rsLoRA's scale α / √r (Kalajdzievski 2023, arXiv:2312.03732) and LoRA+'s faster B (Hayou et al. 2024, arXiv:2402.12354).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import ClassVar, Literal

from torch import Tensor, nn

from weft.core import Adapter, Method, Site, WeftError, base_class, by_pattern, is_conv, is_linear, several
from weft.methods.lora_init import ELSEWHERE
from weft.methods.lora_layers import LowRankConv, LowRankEmbedding
from weft.methods.lora_linear import Factors, LowRank
from weft.methods.lora_start import FROM_BASE, LowRankFrom
from weft.methods.parameters import on_parameters
from weft.methods.trainable_tokens import WithTokens

__all__ = ["LoRA", "LowRank"]


@dataclass(frozen=True, kw_only=True)
class LoRA(WithTokens, Method):
    """Low-rank adaptation.

    Args:
        rank: r, the columns of B and rows of A. What a layer can learn grows with it; so does the file.
        alpha: The update is scaled by alpha / rank, so that one learning rate serves every rank.
        dropout: Probability of dropping an input of A while training.
        rslora: Scale by alpha / sqrt(rank) instead; for ranks of 64 and more.
        lr_ratio: LoRA+: B learns this many times as fast as A (the paper suggests 16).
        init: How A starts: "kaiming" (uniform in ±1/√in) or "gaussian" (standard deviation 1 / rank); B starts at zero. Or "orthogonal",
            on linear layers: neither starts at zero, but their product does; the rank must be even. Or, on linear layers, from the
            base's own weight: "pissa", "pissa_niter_N" (its singular vectors, exactly or by N rounds of iteration) or "olora" (QR). Or,
            in `weft train`, from more than the model: "eva" (A from the first batches of the training data) or "loftq" (from what packing
            the base lost).
        bias: Train biases of the base too: "none", "lora_only" (those of the targets) or "all".
        lora_bias: Give B a bias of its own.
        train_A: False is LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A stays as it started, on linear layers and convolutions, which
            leaves the optimiser only B.
        rank_pattern: Other ranks for some layers: regular expression for the end of the path -> rank; the first match counts.
        alpha_pattern: Other alphas, in the same way.
        target_parameters: Parameters that are no layer's weight: fused experts ("experts.gate_up_proj"); with targets=() these alone.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    lr_ratio: float = 1.0
    init: str = "kaiming"
    bias: Literal["none", "lora_only", "all"] = "none"
    lora_bias: bool = False
    train_A: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: str | tuple[str, ...] = ()

    default_lr: ClassVar[float] = 2e-4  # Dettmers et al. 2023; Biderman et al. 2024 find 2e-4 to 5e-4 best
    site: ClassVar[str] = "linear layers, transformers' Conv1D, embeddings and convolutions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_parameters, list):
            object.__setattr__(self, "target_parameters", tuple(self.target_parameters))
        ranks = [self.rank, *self.rank_pattern.values()]
        wrong = [f"a rank of {r!r}: a rank is a whole number of at least 1" for r in ranks if not isinstance(r, int) or r < 1]
        if self.init not in ("kaiming", "gaussian", "orthogonal", *ELSEWHERE) and not FROM_BASE.fullmatch(self.init):
            known = "kaiming, gaussian, orthogonal, pissa, pissa_niter_N (N rounds, as pissa_niter_16), olora, eva, loftq"
            wrong.append(f"init={self.init!r}: there are {known}")
        if self.bias not in ("none", "lora_only", "all"):
            wrong.append(f"bias={self.bias!r}: there are none, lora_only (the biases of the targets) and all")
        if self.init in ELSEWHERE and type(self) is not LoRA:
            wrong.append(f"init={self.init!r}: that start is for weft.LoRA alone")
        if not 0 <= self.dropout < 1:
            wrong.append(f"a dropout of {self.dropout}: a probability is at least 0 and below 1")
        if wrong:
            raise WeftError(f"{type(self).__name__} cannot be built with " + "; nor with ".join(wrong))

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer) or isinstance(layer, nn.Embedding) or is_conv(layer)

    def scaled(self, path: str) -> tuple[int, float]:
        """(rank, scale) of the layer at this path."""
        if self.from_base:  # by way of what is written, so that the file's scale is the same to the last bit
            rank, scale = self.written().scaled(path)
            return rank // 2, scale
        rank, alpha = by_pattern(self.rank_pattern, path, self.rank), by_pattern(self.alpha_pattern, path, self.alpha)
        return rank, alpha / (sqrt(rank) if self.rslora else rank)

    def first(self, A: Tensor, rank: int = 0) -> nn.Parameter:
        """A as it starts: (rank, in, ...). `rank` is given where A holds the factors of several matrices."""
        if A.is_meta:
            return nn.Parameter(A)
        if self.init == "gaussian":
            return nn.Parameter(nn.init.normal_(A, std=1 / (rank or A.shape[0])))
        return nn.Parameter(nn.init.kaiming_uniform_(A, a=sqrt(5)))

    @property
    def from_base(self) -> bool:
        """Whether the factors start as a part of the base's weight."""
        return FROM_BASE.fullmatch(self.init) is not None

    def kind(self, layer: object) -> type[Factors]:
        """The adapter's class for such a layer."""
        if self.from_base:
            if not is_linear(layer):
                raise WeftError(f'init="{self.init}" is for linear layers, and this is a {base_class(layer).__name__}')
            return LowRankFrom
        return LowRankEmbedding if isinstance(layer, nn.Embedding) else LowRankConv if is_conv(layer) else LowRank

    def written(self) -> LoRA:
        """The method of the plain LoRA that a file holds: of twice the rank where the start is counted from the base's weight."""
        if not self.from_base:
            return self
        more = sqrt(2) if self.rslora else 2
        return replace(self, rank=2 * self.rank, alpha=more * self.alpha, rank_pattern={p: 2 * r for p, r in self.rank_pattern.items()},
                       alpha_pattern={p: more * a for p, a in self.alpha_pattern.items()}, init="kaiming")  # fmt: skip

    def build(self, layer: Site, path: str) -> Adapter:
        if self.init in ELSEWHERE:
            raise WeftError(f"init={self.init!r} is made by {ELSEWHERE[self.init]}")
        return self.kind(layer)(self, layer, *self.scaled(path))

    def also(self, modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
        if self.bias != "all":
            return {}
        return {p: ("bias",) for p, m in modules.items() if p not in targets and m._parameters.get("bias") is not None}

    def beyond(self, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
        return on_parameters(self, modules) | super().beyond(modules)

    def elsewhere(self) -> bool:
        return bool(self.target_parameters or self.modules_to_save) and not several(self.targets)

    def lr_scale(self, parameter: str) -> float:
        return self.lr_ratio if parameter.rpartition(".")[2].rstrip("0123456789") == "B" else 1.0
