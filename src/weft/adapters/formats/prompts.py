"""Prompts and prefixes in the layout of peft's adapter files.

peft stores what a training network made, under the bare name "prompt_embeddings". The network's own weights lie beside it under names
that begin with "weft.", which peft passes over; of a file without them the vectors themselves are trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from weft.adapters.formats.base import COMMON, Field, Format, checked
from weft.core import Adapter, Method, WeftError, base_class
from weft.methods import PrefixTuning, PromptTuning, PTuning
from weft.methods.prefix import Prefix
from weft.methods.prefix_door import PrefixDoor
from weft.methods.prompt import Prompt, PromptDoor
from weft.methods.ptuning import EncodedPrompt

BARE = "prompt_embeddings"
_ROOT = "base_model."  # where layers trained whole beside a prompt have their names: peft wraps nothing in a "model" here
_network = {name: f"/weft.{name}" for name in ("E", "W1", "b1", "W2", "b2")}
_lstm = {
    f"lstm_{kind}_l{i}{end}": f"/weft.lstm.{kind}_l{i}{end}"
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for i in range(16) for end in ("", "_reverse")
}  # fmt: skip
_mlp = {f"mlp_{i}_{kind}": f"/weft.mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}

NAMES: dict[type[Adapter], dict[str, str]] = {  # a name that begins with "/" is the whole name
    Prefix: {"P": f"/{BARE}"} | _network, PrefixDoor: {}, Prompt: {"P": f"/{BARE}"}, PromptDoor: {}, EncodedPrompt: _network | _lstm | _mlp,
}  # fmt: skip
_SHAPE = Field(why="the model's own; the tensor's shape is compared with it")
_FIELDS = COMMON | {
    "num_virtual_tokens": Field("tokens"), "token_dim": _SHAPE, "num_layers": _SHAPE, "num_attention_heads": _SHAPE,
}  # fmt: skip
_PREFIX = _FIELDS | {
    "num_transformer_submodules": Field(why="follows from the model's kind"), "prefix_projection": Field("projection"),
    "encoder_hidden_size": Field("hidden"), "init_weights": Field("init"),
}  # fmt: skip
_PROMPT = _FIELDS | {
    "num_transformer_submodules": Field("copies"), "prompt_tuning_init": Field("init"), "prompt_tuning_init_text": Field("text"),
    "tokenizer_name_or_path": Field("tokenizer"), "tokenizer_kwargs": Field(why="about how training began"),
}  # fmt: skip
_PTUNING = _FIELDS | {
    "num_transformer_submodules": Field("copies"), "encoder_reparameterization_type": Field("encoder"),
    "encoder_hidden_size": Field("hidden"), "encoder_num_layers": Field("depth"), "encoder_dropout": Field("dropout"),
}  # fmt: skip


def _give(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """What a training network makes now: the tensor that peft reads."""
    found: Any = next(a for a in adapters.values() if isinstance(a, Prefix | Prompt))
    if "P" in found._parameters:
        return {}
    values: Tensor = found.values().detach().contiguous().cpu()
    return {BARE: values}


def _common(model: nn.Module, adapters: Mapping[str, Adapter]) -> tuple[Any, dict[str, Any]]:
    found: Any = next(a for a in adapters.values() if isinstance(a, Prefix | Prompt))
    both, name = bool(getattr(model, "config").is_encoder_decoder), base_class(model).__name__  # noqa: B009
    config: dict[str, Any] = {"num_virtual_tokens": found.ahead or found.columns, "num_transformer_submodules": 2 if both else 1}
    if name.endswith("Model") and not name.endswith("LMHeadModel"):
        config["task_type"] = "FEATURE_EXTRACTION"  # without a task peft would never put the prompt in
    return found, config


def _write_prefix(method: PrefixTuning, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    found, config = _common(model, adapters)
    width = found.heads * found.size
    return config | {
        "token_dim": width, "num_attention_heads": found.heads, "num_layers": found.layers, "prefix_projection": method.projection,
        "encoder_hidden_size": method.hidden or width, "init_weights": "zero" if method.init == "zero" else None,
    }  # fmt: skip


def _write_prompt(method: PromptTuning, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    found, config = _common(model, adapters)
    config |= {"num_transformer_submodules": method.copies, "token_dim": found.values().shape[1]}
    config |= {"num_layers": _number(model, "num_hidden_layers"), "num_attention_heads": _number(model, "num_attention_heads")}
    if isinstance(method, PTuning):
        return config | {
            "encoder_reparameterization_type": "LSTM" if method.encoder == "lstm" else "MLP", "encoder_num_layers": method.depth,
            "encoder_hidden_size": method.hidden or config["token_dim"], "encoder_dropout": method.dropout,
        }  # fmt: skip
    kind = {"vocab": "SAMPLE_VOCAB", "text": "TEXT", "random": "RANDOM"}[method.init]
    return config | {
        "prompt_tuning_init": kind, "prompt_tuning_init_text": method.text,
        "tokenizer_name_or_path": method.tokenizer or (getattr(model, "config").name_or_path if kind == "TEXT" else None),  # noqa: B009
    }  # fmt: skip


def _number(model: nn.Module, name: str) -> int | None:
    return getattr(getattr(model, "config").get_text_config(), name, None)  # noqa: B009


def _read(config: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    checked(config, fields, config["peft_type"])
    if not config.get("num_virtual_tokens"):
        raise WeftError("adapter_config.json does not say num_virtual_tokens")
    return {"tokens": int(config["num_virtual_tokens"])}


def _read_prefix(config: Mapping[str, Any]) -> Method:
    values = _read(config, _PREFIX)
    init: Any = "zero" if config.get("init_weights") == "zero" else "normal"
    projection = bool(config.get("prefix_projection", False))
    return PrefixTuning(**values, projection=projection, hidden=config.get("encoder_hidden_size") if projection else None, init=init)


def _read_prompt(config: Mapping[str, Any]) -> Method:
    values = _read(config, _PROMPT)
    kinds: dict[str, Any] = {"SAMPLE_VOCAB": "vocab", "TEXT": "text"}
    return PromptTuning(
        **values, copies=config.get("num_transformer_submodules") or 1, init=kinds.get(str(config.get("prompt_tuning_init")), "random"),
        text=config.get("prompt_tuning_init_text"), tokenizer=config.get("tokenizer_name_or_path"),
    )  # fmt: skip


def _read_ptuning(config: Mapping[str, Any]) -> Method:
    return PTuning(
        **_read(config, _PTUNING), copies=config.get("num_transformer_submodules") or 1,
        encoder="lstm" if config.get("encoder_reparameterization_type") == "LSTM" else "mlp", hidden=config.get("encoder_hidden_size"),
        depth=config.get("encoder_num_layers", 2), dropout=float(config.get("encoder_dropout", 0.0)),
    )  # fmt: skip


def _told(method: Any, names: Collection[str]) -> Method:
    """Without the network's weights, the vectors themselves are the adapter."""
    if any(n.startswith("weft.") for n in names):
        return method  # type: ignore[no-any-return]
    if isinstance(method, PrefixTuning):
        return replace(method, projection=False, hidden=None)
    return replace(method, encoder="none") if isinstance(method, PTuning) else method


FORMATS: dict[type[Method], Format] = {
    PrefixTuning: Format("PREFIX_TUNING", _write_prefix, _read_prefix, _PREFIX, root=_ROOT, beside=(BARE,), give=_give, told=_told),
    PromptTuning: Format("PROMPT_TUNING", _write_prompt, _read_prompt, _PROMPT, root=_ROOT),
    PTuning: Format("P_TUNING", _write_prompt, _read_ptuning, _PTUNING, root=_ROOT, beside=(BARE,), give=_give, told=_told),
}
