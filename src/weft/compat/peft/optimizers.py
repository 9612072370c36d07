"""LoRA+'s optimiser under peft's name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from weft.compat.peft.layers import fronts
from weft.compat.peft.layers_lora import Embedding


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
