"""The optimisers of LoRA+ and LoRA-FA under peft's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weft.compat.peft.layers import fronts
from weft.compat.peft.layers_lora import Embedding, LoraLayer


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser in which B learns `loraplus_lr_ratio` times as fast as A (Hayou et al. 2024, arXiv:2402.12354).

    Args:
        loraplus_weight_decay: For all but vectors and norms (0). loraplus_lr_embedding: The rate of adapters on embeddings (1e-6).
    """
    decay, embedding_lr = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    on_embeddings = {id(p) for f in fronts(model) if isinstance(f, Embedding) for n in f.names for p in f.slot[n].parameters()}
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in on_embeddings:
            groups["embedding"].append(p)
        elif "lora_B" in name or p.dim() == 1:
            groups["B without decay" if p.dim() == 1 or "bias" in name else "B"].append(p)
        else:
            groups["A"].append(p)
    fast = lr * loraplus_lr_ratio
    rates = {"A": (lr, decay), "embedding": (embedding_lr, decay), "B": (fast, decay), "B without decay": (fast, 0.0)}
    made: Any = optimizer_cls
    return made([{"params": groups[k], "lr": r, "weight_decay": d} for k, (r, d) in rates.items()], lr=lr, **kwargs)  # type: ignore[no-any-return]


class LoraFAOptimizer(Optimizer):
    """AdamW in which a LoRA's B follows the gradient of the whole weight as nearly as it can, while A stays (LoRA-FA, Zhang et al. 2023).

        g ↦ g (A Aᵀ)⁻¹ / s²        which minimises ‖s g_B A - ∂L/∂W‖ for ∂L/∂W = G, of which B's own gradient is g = s G Aᵀ

    Args:
        params: Parameters, or groups of them.
        correct_bias: Adam's correction of its means for their start at zero.
        factors: For each B its (A, s). A parameter that is none goes as in AdamW.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, correct_bias: bool = True, factors: Mapping[Tensor, tuple[Tensor, float]] | None = None,
    ) -> None:  # fmt: skip
        if lr < 0 or eps < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"lr={lr}, eps={eps}, betas={betas}: the first two are at least 0, and betas at least 0 and below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias})
        self.factors = dict(factors or {})  # not in the groups, since A belongs to the model's state and not to the optimiser's

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = _projected(p.grad, *self.factors[p]) if p in self.factors else p.grad
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                state["mean"].lerp_(g, 1 - beta1)
                state["square"].lerp_(g * g, 1 - beta2)
                rate = group["lr"]
                if group["correct_bias"]:
                    rate = rate * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                p.addcdiv_(state["mean"], state["square"].sqrt().add_(group["eps"]), value=-rate)
                p.mul_(1 - group["lr"] * group["weight_decay"])
        return loss


def _projected(g: Tensor, A: Tensor, scale: float) -> Tensor:
    gram = (A @ A.T).float() + 1e-8 * torch.eye(len(A), device=A.device)
    return ((g.float() @ torch.linalg.pinv(gram)) / scale**2).to(g.dtype)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """LoRA-FA's optimiser for a model: every lora_A stops training, and each lora_B gets its layer's own scale.

    Args:
        r, lora_alpha, use_rslora: Taken for peft's sake; rank and scale are read off the layers.
    """
    factors: dict[Tensor, tuple[Tensor, float]] = {}
    for front in (f for f in fronts(model) if isinstance(f, LoraLayer) and not isinstance(f, Embedding)):
        for name in front.names:
            adapter: Any = front.slot[name]
            if "A" in adapter._parameters and adapter.A.dim() == 2:
                adapter.A.requires_grad_(False)
                factors[adapter.B] = (adapter.A, front.scaling[name])
    return LoraFAOptimizer([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, factors=factors)
