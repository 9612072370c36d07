"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al. 2023, arXiv:2303.10512).

    h = W₀x + s · P Λ Q x,   s = α / (r₀ + 1e-5)        P ∈ ℝ^{out × r₀}, Λ diagonal, Q ∈ ℝ^{r₀ × in}; Λ = 0 at the start

While training, the triplets (P's column, λ, Q's row) of all layers compete: after a step that is due, those of least importance
have their λ set to zero, until `target_rank` a layer are left on average. The importance of a triplet is that of λ plus the mean over
P's column plus the mean over Q's row; that of one weight is Ī · Ū, where Ī is the running mean of |w · ∂L/∂w| and Ū that of its
deviation. Here P is `B`, Λ is `E` and Q is `A`, as in peft's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Method, Site, WeftError, features, is_conv1d, is_linear, plain
from weft.kernels.low_rank import low_rank_add
from weft.methods.trainable_tokens import WithTokens
from weft.quant import dense


class Triplets(Adapter):
    """A (rank, in), E (rank, 1) and B (out, rank) of one layer, and what is known of their importance."""

    def __init__(self, method: AdaLoRA, layer: Site, rank: int, gamma: float) -> None:
        super().__init__()
        inside, outside = features(layer)
        self.scale, self.dropout, self.gamma = method.alpha / (method.rank + 1e-5), method.dropout, gamma
        self.A, self.E, self.B = (nn.Parameter(torch.zeros(s)) for s in ((rank, inside), (rank, 1), (outside, rank)))
        for p in (self.A, self.B):
            nn.init.normal_(p, std=0.02)
        for name, weight in list(self.named_parameters()):  # buffers, so that a run resumes exactly
            self.register_buffer(f"{name}_mean", torch.zeros(weight.shape), persistent=False)
            self.register_buffer(f"{name}_deviation", torch.zeros(weight.shape), persistent=False)
        self.dropped: Tensor
        self.register_buffer("dropped", torch.zeros(rank, dtype=torch.bool), persistent=False)

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        y: Tensor = layer.frozen(x)
        if not len(self.E):  # a saved layer to which the budget left nothing
            return y
        x = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return low_rank_add(y, x, self.A * self.E, self.B, self.scale)

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module = plain(layer)
        update = self.scale * (self.B @ (self.A * self.E)).detach()
        return {"weight": dense(module).float() + (update.T if is_conv1d(module) else update)}

    def penalty(self) -> Tensor:
        """γ / 2n · (‖QQᵀ − I‖ + ‖PᵀP − I‖) for n layers: as in peft, the norms themselves, where the paper has their squares."""
        eye = torch.eye(len(self.E), device=self.E.device)
        apart = [torch.linalg.matrix_norm(gram - eye) for gram in (self.A @ self.A.T, self.B.T @ self.B)]
        return self.gamma * torch.stack(apart).sum()

    @torch.no_grad()
    def learn(self, beta1: float, beta2: float) -> None:
        """Take the gradient of the step into the running means."""
        for name, p in self._parameters.items():
            mean, deviation = self._buffers[f"{name}_mean"], self._buffers[f"{name}_deviation"]
            assert p is not None and p.grad is not None and mean is not None and deviation is not None
            now = (p * p.grad).abs()
            mean.lerp_(now, 1 - beta1)
            deviation.lerp_((now - mean).abs(), 1 - beta2)

    def importance(self) -> Tensor:
        """(rank,) the importance of each triplet."""
        score = {n: self._buffers[f"{n}_mean"] * self._buffers[f"{n}_deviation"] for n in ("A", "E", "B")}  # type: ignore[operator]
        return score["E"].flatten() + score["A"].mean(1) + score["B"].mean(0)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(WithTokens, Method):
    """LoRA whose ranks are shared out among the layers while training.

    Args:
        rank: r₀, what each layer starts with (peft's init_r).
        target_rank: What is left of it on average (target_r).
        alpha: The update is scaled by alpha / rank.
        dropout: Probability of dropping an input of Q while training.
        tinit: Steps before the first triplet is dropped.
        tfinal: Steps at the end during which the ranks stay as they are.
        delta_t: Steps from one sharing-out to the next.
        beta1: Memory of the importance.
        beta2: Memory of its deviation.
        orth_weight: γ, how strongly P and Q are held orthogonal (orth_reg_weight).
        rank_pattern: Which triplets a saved adapter kept, by the path of the layer; written when it is saved.
    """

    rank: int = 12
    target_rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_weight: float = 0.5
    rank_pattern: dict[str, list[bool]] = field(default_factory=dict)

    default_lr: ClassVar[float] = 1e-3  # above LoRA's, since P, Λ and Q all start near zero; sweep it
    site: ClassVar[str] = "linear layers and transformers' Conv1D"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.rank, int) and isinstance(self.target_rank, int) and 1 <= self.target_rank <= self.rank):
            raise WeftError(f"AdaLoRA cannot go from a rank of {self.rank} to {self.target_rank}: give 1 ≤ target_rank ≤ rank")

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer)

    def build(self, layer: Site, path: str) -> Adapter:
        return self.build_all({path: layer})[path]

    def build_all(self, layers: Mapping[str, Site]) -> dict[str, Adapter]:
        kept = {p: sum(self.rank_pattern[p]) if p in self.rank_pattern else self.rank for p in layers}
        return {p: Triplets(self, layer, kept[p], self.orth_weight / (2 * len(layers))) for p, layer in layers.items()}

    def budget(self, step: int, steps: int, layers: int) -> int:
        """Triplets that all layers together may have after `step` of `steps`: the paper's cubic schedule."""
        start, end = self.rank * layers, self.target_rank * layers
        if step <= self.tinit:
            return start
        left = 1 - (step - self.tinit) / (steps - self.tfinal - self.tinit) if step < steps - self.tfinal else 0.0
        return int((start - end) * left**3 + end)

    def after_step(self, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        many: list[Any] = [a for a in adapters.values() if isinstance(a, Triplets)]
        now, last = step + 1, max(steps - self.tfinal, 1)  # `step` counts from 0
        if now < last:
            for a in many:
                a.learn(self.beta1, self.beta2)
        if now == last or (self.tinit < now < last and now % self.delta_t == 0):
            scores = torch.cat([a.importance() for a in many])
            excess = len(scores) - self.budget(now, steps, len(many))
            cut = scores.kthvalue(excess).values if excess > 0 else scores.new_tensor(-1.0)
            for a in many:
                a.dropped.copy_(a.importance() <= cut)
        if now >= last or (self.tinit < now and now % self.delta_t == 0):
            for a in many:
                a.E.data.masked_fill_(a.dropped[:, None], 0.0)
