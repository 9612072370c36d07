"""AdaLoRA in the layout of peft's adapter files: only the triplets that are left, and which they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weft.adapters.formats.base import COMMON, Field, Format, checked, short_names, whole
from weft.adapters.formats.common import LAYERS, targets
from weft.adapters.formats.lora import FIELDS as LORA
from weft.adapters.formats.trainable_tokens import TOKENS, beside, tokens
from weft.core import Adapter, Method, is_conv1d
from weft.methods import AdaLoRA
from weft.methods.adalora import Triplets

NAMES: dict[type[Adapter], dict[str, str]] = {Triplets: {"A": "lora_A", "B": "lora_B", "E": "lora_E"}}

_LORA_ONLY = "a field of LoRA's that peft's AdaLoRA does not use"
FIELDS: dict[str, Field] = (
    {name: f for name, f in LORA.items() if f.refused or name in COMMON | LAYERS | TOKENS or not f.weft}
    | {
        name: Field(why=_LORA_ONLY)
        for name in ("r", "use_rslora", "alpha_pattern", "lora_bias", "qalora_group_size")
    }
    | {
        "init_lora_weights": Field(why="about how training began: nothing that a trained adapter computes"),
        "init_r": Field("rank"),
        "target_r": Field("target_rank"),
        "lora_alpha": Field("alpha"),
        "lora_dropout": Field("dropout"),
        "tinit": Field("tinit"),
        "tfinal": Field("tfinal"),
        "deltaT": Field("delta_t"),
        "beta1": Field("beta1"),
        "beta2": Field("beta2"),
        "orth_reg_weight": Field("orth_weight"),
        "total_step": Field(why="the trainer knows how many steps there are"),
        "rank_pattern": Field("rank_pattern"),
        "use_dora": Field(why="AdaLoRA has no magnitudes", neutral=False, refused=True),
        "bias": Field(why="AdaLoRA here trains triplets only; train biases with weft.BitFit beside it", neutral="none", refused=True),
        "target_parameters": Field(why="AdaLoRA is for layers here", refused=True),
        "alora_invocation_tokens": Field(why="AdaLoRA acts on every token", refused=True),
    }
)  # fmt: skip


def left(adapter: Triplets) -> Tensor:
    """(rank,) bool: the triplets that do something. One whose λ grew again since it was dropped stays."""
    return ~(adapter.dropped & (adapter.E.detach().flatten() == 0))


def _write(method: AdaLoRA, model: nn.Module, adapters: Mapping[str, Any]) -> dict[str, Any]:
    pattern, layers = {}, {p: a for p, a in adapters.items() if isinstance(a, Triplets)}
    for path, a in layers.items():
        kept = left(a).tolist()
        pattern[f"{path}.lora_E"] = kept + [False] * (method.rank - len(kept))
    return {
        "r": 8, "init_r": method.rank, "target_r": method.target_rank, "lora_alpha": whole(method.alpha), "lora_dropout": method.dropout,
        "tinit": method.tinit, "tfinal": method.tfinal, "deltaT": method.delta_t, "beta1": method.beta1, "beta2": method.beta2,
        "orth_reg_weight": method.orth_weight, "total_step": method.tinit + method.tfinal + 1, "bias": "none",
        "rank_pattern": None if all(all(kept) for kept in pattern.values()) else pattern, "target_modules": short_names(model, layers),
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(p)) for p in layers),
    } | beside(method, adapters)  # fmt: skip


def _read(config: Mapping[str, Any]) -> AdaLoRA:
    checked(config, FIELDS, "AdaLoRA")
    given = {p.removesuffix(".default").removesuffix(".lora_E"): list(kept) for p, kept in (config.get("rank_pattern") or {}).items()}
    rank, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
    return AdaLoRA(
        rank=rank, target_rank=min(config.get("target_r", 8), rank), alpha=float(alpha) if alpha > 0 else float(rank),
        dropout=float(config.get("lora_dropout", 0.0)), tinit=config.get("tinit", 0), tfinal=config.get("tfinal", 0),
        delta_t=config.get("deltaT", 1), beta1=config.get("beta1", 0.85), beta2=config.get("beta2", 0.85),
        orth_weight=config.get("orth_reg_weight", 0.5), rank_pattern=given,
        **tokens(config), **targets(config),
    )  # fmt: skip


def _stored(adapter: Any, parameter: str, tensor: Tensor) -> Tensor:
    if not isinstance(adapter, Triplets):
        return tensor
    kept = left(adapter)
    return tensor[:, kept] if parameter == "B" else tensor[kept]


FORMATS: dict[type[Method], Format] = {AdaLoRA: Format("ADALORA", _write, _read, FIELDS, stored=_stored)}
