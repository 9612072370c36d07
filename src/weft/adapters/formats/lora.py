"""LoRA in the layout of peft's adapter files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from weft.adapters.formats.base import Format, short_names, whole
from weft.core import Adapter, Method, Replaced, WeftError
from weft.methods import LoRA
from weft.methods.lora import LowRank
from weft.methods.lora_layers import LowRankConv, LowRankEmbedding

# adapter class -> its parameters' names -> peft's names after the module's path
NAMES: dict[type[Adapter], dict[str, str]] = {
    LowRank: {"A": "lora_A.weight", "B": "lora_B.weight", "b": "lora_B.bias", "bias": "base_layer.bias"},
    LowRankConv: {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "base_layer.bias"},
    LowRankEmbedding: {"A": "lora_embedding_A", "B": "lora_embedding_B"},
}

# Fields of peft's LoraConfig that change what is computed and that weft does not have: refused unless they hold this value.
_NEUTRAL: dict[str, Any] = {
    "use_dora": False, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "target_parameters": None,
    "trainable_token_indices": None, "layer_replication": None, "alora_invocation_tokens": None, "use_qalora": False,
    "use_bdlora": None, "arrow_config": None, "monteclora_config": None, "kasa_config": None, "velora_config": None,
}  # fmt: skip
_HARMLESS = {  # about how training began, or about other software: nothing that a trained adapter computes
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "revision", "task_type", "fan_in_fan_out", "runtime_config",
}  # fmt: skip
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "lora_bias", "target_modules", "exclude_modules",
         "rank_pattern", "alpha_pattern"}  # fmt: skip


def _write_lora(method: LoRA, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    low_rank = {p: a for p, a in adapters.items() if not isinstance(a, Replaced)}
    ranks, alphas = _patterns(method, low_rank)
    return {
        "r": method.rank, "lora_alpha": whole(method.alpha), "lora_dropout": method.dropout, "use_rslora": method.rslora,
        "use_dora": False, "bias": method.bias, "lora_bias": method.lora_bias, "init_lora_weights": method.init == "kaiming" or "gaussian",
        "target_modules": short_names(model, low_rank), "exclude_modules": None, "modules_to_save": None, "layers_to_transform": None,
        "rank_pattern": ranks, "alpha_pattern": alphas,
        "fan_in_fan_out": any(type(model.get_submodule(p)).__name__.endswith("Conv1D") for p in low_rank),
    }  # fmt: skip


def _patterns(method: LoRA, adapters: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, float]]:
    """The method's patterns if they describe these adapters, else one entry for every layer that differs from the method's rank."""
    truth = {p: (a.A.shape[0], a.scale) for p, a in adapters.items()}
    if all(method.scaled(p) == t for p, t in truth.items()):
        return dict(method.rank_pattern), dict(method.alpha_pattern)
    plain = replace(method, rank_pattern={}, alpha_pattern={}).scaled("")
    odd = {p: t for p, t in truth.items() if t != plain}
    found = {re.escape(p): (r, s * (r**0.5 if method.rslora else r)) for p, (r, s) in odd.items()}
    return {p: r for p, (r, _) in found.items()}, {p: whole(a) for p, (_, a) in found.items()}


def _read_lora(config: Mapping[str, Any]) -> Method:
    wrong = [f"{k}={config[k]!r}" for k, v in _NEUTRAL.items() if config.get(k, v) not in (v, None, [], {}, False)]
    unknown = sorted(set(config) - set(_NEUTRAL) - _HARMLESS - _READ)
    wrong += [f"{k}={config[k]!r} (unknown)" for k in unknown if config[k] not in (None, False, [], {})]
    if wrong:
        raise WeftError("this LoRA uses what weft does not compute: " + ", ".join(wrong))
    given = config.get("target_modules")
    if not given:
        raise WeftError("adapter_config.json names no target_modules")
    exclude = config.get("exclude_modules") or ()
    values = {
        "rank": config.get("r", 8), "alpha": float(config.get("lora_alpha", 8)), "dropout": float(config.get("lora_dropout", 0.0)),
        "rslora": bool(config.get("use_rslora", False)), "bias": config.get("bias", "none"),
        "lora_bias": bool(config.get("lora_bias", False)),
        "targets": given if given == "all-linear" else f"re:{given}" if isinstance(given, str) else tuple(sorted(given)),
        "exclude": f"re:{exclude}" if isinstance(exclude, str) else tuple(sorted(exclude)),
        "rank_pattern": dict(config.get("rank_pattern") or {}), "alpha_pattern": dict(config.get("alpha_pattern") or {}),
    }  # fmt: skip
    return LoRA(**values)


FORMATS: dict[type[Method], Format] = {LoRA: Format("LORA", _write_lora, _read_lora)}
