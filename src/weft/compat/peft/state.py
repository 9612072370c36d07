"""An adapter's tensors in and out of a model, under the names of its file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from weft.adapters.formats import Format, format_of
from weft.compat.peft.adalora import resized
from weft.compat.peft.kinds import PeftType, as_value_error
from weft.compat.peft.layers import BaseTunerLayer
from weft.compat.peft.moe import fuse_state
from weft.compat.peft.targets import SHORTHAND, match_target_against_key
from weft.compat.peft.wrappers import ModulesToSaveWrapper
from weft.core import Adapter, modules

SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME = "adapter_model.safetensors", "adapter_model.bin"
EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")
_BARE = ("lora_magnitude_vector",)  # in the file without the ".weight" that the live module has


def infer_device() -> str:
    """The device that peft loads to by default."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def live_names(model: nn.Module, adapter_name: str, state: Mapping[str, Any]) -> dict[str, str]:
    """Name in the file -> name in `state_dict()`, for every tensor of one adapter: found by where it stands, never by what it is called."""
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        at = f"{path}." if path else ""
        if isinstance(module, BaseTunerLayer) and not module.stored:
            continue
        if isinstance(module, BaseTunerLayer):
            for child, container in module.named_children():
                if child != "ranknum" and isinstance(container, nn.ModuleDict | nn.ParameterDict) and adapter_name in container:
                    live = f"{at}{child}.{adapter_name}"
                    if live in state:
                        names[f"{at}{child}"] = live
                    for key in state if f"{live}.weight" not in state else (f"{live}.weight", f"{live}.bias"):
                        if key in state and key.startswith(f"{live}."):
                            file = f"{at}{child}" if child in _BARE else f"{at}{child}{key[len(live) :]}"
                            names[file] = key
        elif isinstance(module, ModulesToSaveWrapper):
            for file, live in module.adapter_state_dict_load_map(adapter_name).items():
                names[f"{at}{file}"] = f"{at}{live}"
    return names


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, without the adapter's name in their keys, as they stand in its file.

    Args:
        model: A PeftModel, or a model after `inject_adapter_in_model`.
        state_dict: The model's state, if it was gathered elsewhere.
        save_embedding_layers: Whether the base's embeddings go with it; "auto": if they are targets.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = model.peft_config[adapter_name]
    state = model.state_dict() if state_dict is None else state_dict
    if config.is_prompt_learning:
        return dict(model.prompt_state(adapter_name))
    found = {file: state[live] for file, live in live_names(model, adapter_name, state).items() if live in state}
    if config.peft_type == PeftType.ADALORA:
        found = resized(config, _parts(model, adapter_name), found)
    found |= _biases(model, config, state)
    found |= _shared(model, adapter_name)
    found |= _embeddings(model, config, state, save_embedding_layers)
    return found


def _of(model: nn.Module, name: str) -> tuple[Format, dict[str, Adapter]] | None:
    """How an adapter is written, and its parts by path."""
    parts = _parts(model, name)
    return (format_of(type(next(iter(parts.values())).method)), parts) if parts else None


def _parts(model: nn.Module, name: str) -> dict[str, Adapter]:
    return {p: m.slot[name] for p, m in model.named_modules() if isinstance(m, BaseTunerLayer) and name in m.trains}


def _shared(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a method keeps once for all layers and stores beside them: VeRA's projections."""
    found = _of(model, name)
    return {k: v for k, v in found[0].give(found[1]).items() if k in found[0].beside} if found else {}


def _biases(model: nn.Module, config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return {}
    if bias == "all":
        return {k: v for k, v in state.items() if k == "bias" or (k.endswith(".bias") and ".modules_to_save." not in k)}
    paths = [p for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    return {k: state[k] for p in paths if (k := f"{p}.base_layer.bias") in state}


def _embeddings(model: Any, config: Any, state: Mapping[str, Tensor], wanted: bool | str) -> dict[str, Tensor]:
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != SHORTHAND:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        ends = [p for p, _ in inner.named_modules() if p.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
        targeted = any(match_target_against_key(targets, p) for p in ends)
    else:
        targeted = any(n in (targets or ()) for n in EMBEDDING_LAYER_NAMES)
    tokens = config.peft_type == PeftType.TRAINABLE_TOKENS or getattr(config, "trainable_token_indices", None) is not None
    if wanted == "auto":
        wanted = targeted and not tokens
        if wanted:
            warnings.warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=4)
        elif _resized(model, config):
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.", stacklevel=4
            )
            wanted = True
    if not wanted:
        return {}
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn("Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=4)
        return {}
    found: dict[str, Tensor] = {}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        path = next((p for p, m in model.named_modules() if m is layer), None)
        if path and (not targeted or isinstance(layer, BaseTunerLayer)):
            inside = f"{path}.base_layer." if isinstance(layer, BaseTunerLayer) else f"{path}."
            found |= {k: v for k, v in state.items() if k.startswith(inside)}
    return found


def _resized(model: Any, config: Any) -> bool:
    """Whether the vocabulary differs from that of the base's own folder."""
    source = getattr(config, "base_model_name_or_path", None)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not source or size is None or not (Path(source) / "config.json").is_file():
        return False
    return bool(size != type(model.config).from_pretrained(source).vocab_size)


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Put tensors (as `get_peft_model_state_dict` gives them) into an adapter that is there already.

    Returns: what `load_state_dict` returns, `missing_keys` and `unexpected_keys`. Raises RuntimeError for another shape, unless ignored.
    """
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        return model.load_prompt_state(adapter_name, peft_model_state_dict)
    state = model.state_dict()
    names = live_names(model, adapter_name, state)
    has_prefix = any(k.startswith("base_model.model.") for k in state)
    put: dict[str, Tensor] = {}
    beside: dict[str, Tensor] = {}
    written = _of(model, adapter_name)
    shared = written[0].beside if written else ()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for key, value in fuse_state(base, peft_model_state_dict).items():
        own = key if has_prefix else key.removeprefix("base_model.model.")
        if own.removesuffix(".weight") in names and own not in names:
            own = own.removesuffix(".weight")  # older files gave a name to what is now a bare tensor
        if own in shared:
            beside[own] = value
            continue
        put[names.get(own, own)] = value
    if written:
        with as_value_error():
            written[0].take(written[1], beside)
    odd = [(k, tuple(v.shape), tuple(state[k].shape)) for k, v in put.items() if k in state and state[k].shape != v.shape]
    if odd and ignore_mismatched_sizes:
        put = {k: v for k, v in put.items() if k not in {o[0] for o in odd}}
    result = model.load_state_dict(put, strict=False, assign=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        for module in list(model.modules()):
            if isinstance(module, BaseTunerLayer):
                module._move_adapter_to_device_of_base_layer(adapter_name)
    if odd and ignore_mismatched_sizes:
        lines = "\n".join(f"- {k}: found shape {a} in the checkpoint and {b} in the model instantiated" for k, a, b in odd)
        warnings.warn(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being ignored because you "
            f"passed `ignore_mismatched_sizes=True`: {lines}.",
            stacklevel=2,
        )
    return result


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors under the names that they had before any adapter came."""
    return {
        f"{path}.{name}" if path else name: p.detach()
        for path, module in modules(model)
        for name, p in (*module._parameters.items(), *module._buffers.items())
        if p is not None and name not in module._non_persistent_buffers_set
    }


def set_base_model_state_dict(model: nn.Module, base_model_state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Write tensors into the base under its own names; adapters stay as they are. Returns missing and unexpected keys."""
    own = get_base_model_state_dict(model)
    missing, unexpected = sorted(set(own) - set(base_model_state_dict)), sorted(set(base_model_state_dict) - set(own))
    odd = [k for k, v in base_model_state_dict.items() if k in own and own[k].shape != v.shape]
    if odd or (strict and (missing or unexpected)):
        raise RuntimeError(f"Error(s) in loading the base's state: missing {missing}, unexpected {unexpected}, of another shape {odd}")
    with torch.no_grad():
        for key, value in base_model_state_dict.items():
            if key in own:
                own[key].copy_(value)
    return _IncompatibleKeys(missing, unexpected)


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: Mapping[str, str] | None = None, **download: Any
) -> dict[str, Tensor]:
    """The tensors of a saved adapter, from a folder or a repository of the hub."""
    where = device or infer_device()
    path, safe = _weights_file(model_id, download)
    found = load_file(path, device=str(where)) if safe else torch.load(path, map_location=torch.device(where), weights_only=True)
    if not key_mapping:
        return dict(found)
    mapped: dict[str, Tensor] = {}
    for key, value in found.items():
        prefix = next((p for p in ("base_model.model.", "base_model.") if key.startswith(p)), "")
        inner = key.removeprefix(prefix)
        for pattern, replacement in key_mapping.items():
            changed, n = re.subn(pattern, replacement, inner)
            if n:
                inner = changed
                break
        mapped[prefix + inner] = value
    return mapped


def _weights_file(model_id: str, download: dict[str, Any]) -> tuple[str, bool]:
    subfolder = download.get("subfolder")
    folder = Path(model_id, subfolder or "")
    for name, safe in ((SAFETENSORS_WEIGHTS_NAME, True), (WEIGHTS_NAME, False)):
        if (folder / name).exists():
            return str(folder / name), safe
    download = {k: v for k, v in download.items() if v is not None and k not in ("use_auth_token", "user_agent")}
    try:
        if file_exists(str(model_id), f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}" if subfolder else SAFETENSORS_WEIGHTS_NAME):
            return str(hf_hub_download(str(model_id), SAFETENSORS_WEIGHTS_NAME, **download)), True
        return str(hf_hub_download(str(model_id), WEIGHTS_NAME, **download)), False
    except (EntryNotFoundError, LocalEntryNotFoundError, OSError) as e:
        raise ValueError(
            f"Can't find weights for {model_id} in {model_id} or in the Hugging Face Hub. "
            f"Please check that the file {WEIGHTS_NAME} or {SAFETENSORS_WEIGHTS_NAME} is present at {model_id}."
        ) from e
