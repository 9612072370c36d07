"""LoRA in the layout of peft's adapter files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from weft.adapters.formats.base import COMMON, Field, Format, checked, short_names, whole
from weft.adapters.formats.common import LAYERS, NOWHERE, targets
from weft.adapters.formats.trainable_tokens import TOKENS, beside, tokens
from weft.core import Adapter, Method, WeftError, several
from weft.methods import ALoRA, DoRA, LoRA
from weft.methods.alora import Activated
from weft.methods.dora import DecomposedConv, DecomposedEmbedding, DecomposedLinear
from weft.methods.lora import LowRank
from weft.methods.lora_layers import LowRankConv, LowRankEmbedding
from weft.methods.lora_linear import Factors
from weft.methods.lora_start import FROM_BASE, LowRankFrom
from weft.methods.parameters import LowRankParameters

# adapter class -> its parameters' names -> peft's names after the module's path
NAMES: dict[type[Adapter], dict[str, str]] = {
    LowRank: {"A": "lora_A.weight", "B": "lora_B.weight", "b": "lora_B.bias", "bias": "base_layer.bias"},
    LowRankFrom: {"A": "lora_A.weight", "B": "lora_B.weight", "b": "lora_B.bias", "bias": "base_layer.bias"},
    LowRankConv: {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "base_layer.bias"},
    LowRankEmbedding: {"A": "lora_embedding_A", "B": "lora_embedding_B"},
    # peft wraps a module once for each of its parameters: the second lies inside the first one's wrapper, and so on
    LowRankParameters: {f"{f}{i}": f"{'base_layer.' * i}lora_{f}.weight" for f in "AB" for i in range(4)},
}
NAMES[Activated] = NAMES[LowRank]
for _kind, _base in ((DecomposedLinear, LowRank), (DecomposedConv, LowRankConv), (DecomposedEmbedding, LowRankEmbedding)):
    NAMES[_kind] = NAMES[_base] | {"m": "lora_magnitude_vector"}

_START = "about how training began: nothing that a trained adapter computes"
_ELSE = "a variant of LoRA that weft does not have"

FIELDS: dict[str, Field] = COMMON | LAYERS | TOKENS | {
    "r": Field("rank"),
    "lora_alpha": Field("alpha"),
    "lora_dropout": Field("dropout"),
    "use_rslora": Field("rslora"),
    "use_dora": Field("the method: weft.DoRA"),
    "bias": Field("bias"),
    "lora_bias": Field("lora_bias"),
    "rank_pattern": Field("rank_pattern"),
    "alpha_pattern": Field("alpha_pattern"),
    "init_lora_weights": Field("init", why=_START),
    "fan_in_fan_out": Field(why="weft sees from the layer how its weight lies"),
    "target_parameters": Field("target_parameters"),
    "alora_invocation_tokens": Field("the method: weft.ALoRA, and its `invocation_tokens`"),
    "layer_replication": Field(why="it builds another model out of repeated layers; build that model first", refused=True),
    "use_qalora": Field(why=_ELSE, refused=True, neutral=False),
    "qalora_group_size": Field(why="belongs to use_qalora"),
    "use_bdlora": Field(why=_ELSE, refused=True),
    "arrow_config": Field(why=_ELSE, refused=True),
    "monteclora_config": Field(why=_ELSE, refused=True),
    "kasa_config": Field(why=_ELSE, refused=True),
    "velora_config": Field(why=_ELSE, refused=True),
    "ensure_weight_tying": Field(why="layers that share an embedding's weight get what the file has for them; copies kept whole stay tied"),
    "loftq_config": Field(why=_START),
    "eva_config": Field(why=_START),
    "corda_config": Field(why=_START),
    "lora_ga_config": Field(why=_START),
    "megatron_config": Field(why="about other software"),
    "megatron_core": Field(why="about other software"),
}


def _write_lora(method: LoRA, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    low_rank = {p: a for p, a in adapters.items() if isinstance(a, Factors)}
    method = method.written()
    fused = {p: a for p, a in adapters.items() if isinstance(a, LowRankParameters)}
    ranks, alphas = _patterns(method, low_rank, fused)
    own = {"alora_invocation_tokens": list(method.invocation_tokens)} if isinstance(method, ALoRA) else {}
    return own | {
        "r": method.rank, "lora_alpha": whole(method.alpha), "lora_dropout": method.dropout, "use_rslora": method.rslora,
        "use_dora": isinstance(method, DoRA), "bias": method.bias, "lora_bias": method.lora_bias,
        "init_lora_weights": method.init == "kaiming" or method.init,
        "target_modules": short_names(model, low_rank) if low_rank or fused else NOWHERE,
        "target_parameters": list(several(method.target_parameters)) or None, **beside(method, adapters),
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": ranks, "alpha_pattern": alphas,
        "fan_in_fan_out": any(type(model.get_submodule(p)).__name__.endswith("Conv1D") for p in low_rank),
    }  # fmt: skip


def _patterns(
    method: LoRA, layers: Mapping[str, Any], fused: Mapping[str, LowRankParameters]
) -> tuple[dict[str, int], dict[str, float]]:
    """The method's patterns if they describe these adapters, else one entry for each layer or parameter that the method's rank does not."""
    truth = {p: (a.product()[0].shape[0], a.scale) for p, a in layers.items()}
    truth |= {f"{p}.{n}": (r, s) for p, a in fused.items() for n, r, s in zip(a.names, a.ranks, a.scales, strict=True)}
    if all(method.scaled(p) == t for p, t in truth.items()):
        return dict(method.rank_pattern), dict(method.alpha_pattern)
    plain = replace(method, rank_pattern={}, alpha_pattern={}).scaled("")
    odd = {p: t for p, t in truth.items() if t != plain}
    found = {re.escape(p): (r, s * (r**0.5 if method.rslora else r)) for p, (r, s) in odd.items()}
    return {p: r for p, (r, _) in found.items()}, {p: whole(a) for p, (_, a) in found.items()}


def _stored(adapter: Any, parameter: str, tensor: Tensor) -> Tensor:
    """A and B as the plain LoRA that computes the same has them."""
    return adapter.product()["AB".index(parameter)].detach() if isinstance(adapter, LowRankFrom) and parameter in ("A", "B") else tensor


def _read_lora(config: Mapping[str, Any]) -> LoRA:
    checked(config, FIELDS, "LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and (FROM_BASE.fullmatch(start) or start in ("corda", "lora_ga")):
        raise WeftError(
            f"init_lora_weights={start!r}: peft trained this adapter on a base that it changed at the start, so on the untouched base "
            "it means something else. Save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), which "
            "makes it plain; or, if the base here is the changed one, set init_lora_weights to true in adapter_config.json"
        )
    call = tuple(config.get("alora_invocation_tokens") or ())
    if call and config.get("use_dora"):
        raise WeftError("use_dora=True with alora_invocation_tokens: DoRA's norm is that of one weight for all tokens; set one of the two")
    kind = partial(ALoRA, invocation_tokens=call) if call else DoRA if config.get("use_dora") else LoRA
    return kind(
        rank=config.get("r", 8), alpha=float(config.get("lora_alpha", 8)), dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora", False)), bias=config.get("bias", "none"), lora_bias=bool(config.get("lora_bias", False)),
        rank_pattern=dict(config.get("rank_pattern") or {}), alpha_pattern=dict(config.get("alpha_pattern") or {}),
        target_parameters=tuple(config.get("target_parameters") or ()),
        **tokens(config), **targets(config),
    )  # fmt: skip


_NOTED = ("train_A", "lr_ratio")


def _claims(config: Mapping[str, Any]) -> type[LoRA]:
    return DoRA if config.get("use_dora") else ALoRA if config.get("alora_invocation_tokens") else LoRA


FORMATS: dict[type[Method], Format] = {
    LoRA: Format("LORA", _write_lora, _read_lora, FIELDS, lambda config: _claims(config) is LoRA, _stored, noted=_NOTED),
    DoRA: Format("LORA", _write_lora, _read_lora, FIELDS, lambda config: _claims(config) is DoRA, noted=_NOTED),
    ALoRA: Format("LORA", _write_lora, _read_lora, FIELDS, lambda config: _claims(config) is ALoRA, noted=_NOTED),
}
