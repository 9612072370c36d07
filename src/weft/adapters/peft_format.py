"""The layout of peft's adapter files: its configuration and its tensor names, to weft's methods and back.

Verified against peft 0.21.2; tests/parity holds both directions to 1e-6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from weft.core import METHODS, Adapter, Method, Replaced, WeftError, modules
from weft.methods import LoRA
from weft.methods.lora import LowRank
from weft.methods.lora_layers import LowRankConv, LowRankEmbedding

PREFIX = "base_model.model."

# adapter class -> its parameters' names -> peft's names after the module's path
NAMES: dict[type[Adapter], dict[str, str]] = {
    LowRank: {"A": "lora_A.weight", "B": "lora_B.weight", "b": "lora_B.bias", "bias": "base_layer.bias"},
    LowRankConv: {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "base_layer.bias"},
    LowRankEmbedding: {"A": "lora_embedding_A", "B": "lora_embedding_B"},
}


def key(path: str, adapter: Adapter, parameter: str) -> str:
    """The name in the file of one parameter of the adapter at `path`."""
    suffix = NAMES.get(type(adapter), {}).get(parameter, parameter)
    return f"{PREFIX}{path}.{suffix}" if path else f"{PREFIX}{suffix}"


@dataclass(frozen=True)
class Format:
    """How one method is written: `write` gives its part of adapter_config.json, `read` the method that a configuration means."""

    peft_type: str
    write: Callable[[Any, nn.Module, Mapping[str, Adapter]], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], Method]


# ---- LoRA ---------------------------------------------------------------------------------------------------------------

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
        "r": method.rank, "lora_alpha": _whole(method.alpha), "lora_dropout": method.dropout, "use_rslora": method.rslora,
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
    whole = {re.escape(p): (r, s * (r**0.5 if method.rslora else r)) for p, (r, s) in odd.items()}
    return {p: r for p, (r, _) in whole.items()}, {p: _whole(a) for p, (_, a) in whole.items()}


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


# ---- any other method --------------------------------------------------------------------------------------------------------


def _write_any(method: Method, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    return {"target_modules": sorted(adapters), "method": method.to_dict()}


def _read_any(config: Mapping[str, Any]) -> Method:
    if not isinstance(config.get("method"), dict):
        raise WeftError("adapter_config.json does not hold the method's hyper-parameters under 'method'")
    return Method.from_dict(config["method"])


FORMATS: dict[type[Method], Format] = {LoRA: Format("LORA", _write_lora, _read_lora)}
OWN = "WEFT_"  # what peft has no type for: the method as it is, and its parameters under their own names (whole ones as modules_to_save)


def format_of(method: type[Method]) -> Format:
    """How this method is written: in peft's way if peft has it, else in weft's own."""
    return FORMATS.get(method) or Format(f"{OWN}{method.__name__.upper()}", _write_any, _read_any)


def format_named(peft_type: str) -> Format:
    """How to read a configuration of this type. Raises WeftError for a type that weft does not have."""
    known = {f.peft_type: f for f in map(format_of, METHODS.values())}
    if peft_type not in known:
        raise WeftError(f"weft does not have the method {peft_type!r}; it has {', '.join(sorted(known))}")
    return known[peft_type]


def short_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The fewest names that peft's suffix rule resolves to exactly these paths: the last parts if they do, else the paths whole."""
    wanted = set(paths)
    ends = {p.rpartition(".")[2] for p in wanted}
    hit = sum(p.rpartition(".")[2] in ends for p, _ in modules(model))
    return sorted(ends) if hit == len(wanted) else sorted(wanted)


def _whole(x: float) -> float:
    return int(x) if float(x).is_integer() else x
