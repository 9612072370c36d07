"""Putting another adapter's weights where one is, without building it anew (a compiled model stays compiled)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from weft.compat.peft.config import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.layers import fronts
from weft.compat.peft.layers_lora import LoraLayer
from weft.compat.peft.state import live_names, load_peft_weights
from weft.compat.peft.targets import get_pattern_key


def hotswap_adapter(model: Any, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any) -> None:
    """Replace the weights and scales of an adapter by those of a saved one.

    Raises ValueError for another method, or for layers that the adapter on the model does not have. Ranks may differ.
    """
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(PeftConfig._get_peft_type(model_name_or_path, **kwargs))].from_pretrained(
        model_name_or_path, **kwargs
    )
    current = model.peft_config.get(adapter_name)
    if getattr(config, "trainable_token_indices", None) or getattr(current, "trainable_token_indices", None):
        raise ValueError("Hotswapping does not work with trained tokens (`trainable_token_indices`).")
    if current is not None:
        check_hotswap_configs_compatible(current, config)
    hotswap_adapter_from_state_dict(model, load_peft_weights(model_name_or_path, device=torch_device, **kwargs), adapter_name, config)


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Raise ValueError unless weights of the one may stand where those of the other are."""
    kinds = [PeftType(c.peft_type).value for c in (config0, config1)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
    if kinds[0] != PeftType.LORA.value:
        raise ValueError(f"Hotswapping only supports {PeftType.LORA} but {kinds[0]} was passed.")
    for field in ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora"):
        ours, theirs = getattr(config0, field), getattr(config1, field)
        if ours != theirs:
            raise ValueError(f"Configs are incompatible: for {field}, {ours} != {theirs}")


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
) -> None:
    """As `hotswap_adapter`, with the tensors at hand, under their names in the file or in the model.

    Layers that the new adapter does not have are left without an update.
    """
    model = getattr(model, "_orig_mod", model)
    if any(adapter_name in front.merged_adapters for front in fronts(model)):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. Please unmerge the adapter "
            "first by calling `peft_model.unmerge_adapter()`."
        )
    names = live_names(model, adapter_name, model.state_dict())
    given = {names.get(key, key): value for key, value in state_dict.items()}
    extra = sorted(set(given) - set(names.values()))
    if extra:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(extra)}.")
    live = {name: given.get(name) for name in names.values()}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.trains:
            continue
        adapter: Any = module.slot[adapter_name]
        inner = path.removeprefix("base_model.model.")
        for child, container in module.named_children():
            key = f"{path}.{child}.{adapter_name}" if path else f"{child}.{adapter_name}"
            for full in (key, f"{key}.weight", f"{key}.bias"):
                if full in live:
                    _write(container, adapter_name, full[len(key) :].lstrip("."), live[full])
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), inner), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), inner), config.lora_alpha)
        adapter.scale = alpha / (rank**0.5 if config.use_rslora else rank)
        module.lora_alpha[adapter_name] = alpha


def _write(container: Any, name: str, inner: str, value: torch.Tensor | None) -> None:
    holder = container[name] if inner else container
    key = inner or name
    old = holder._parameters[key]
    if value is None:
        old.data.zero_()
    elif old.shape == value.shape:
        old.data.copy_(value)
    elif all(a >= b for a, b in zip(old.shape, value.shape, strict=True)):  # room that was made for higher ranks
        old.data.zero_()
        old.data[tuple(slice(0, s) for s in value.shape)].copy_(value)
    else:
        holder._parameters[key] = nn.Parameter(value.to(old.device, old.dtype), requires_grad=old.requires_grad)


def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Make room for ranks up to `target_rank`, with zeros that change nothing, so that a compiled model keeps its shapes."""
    if hasattr(model, "_orig_mod"):
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely result in "
                "re-compilation, hurting performance. Call the function before compiling the model.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            raise ValueError(f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead.")
    if not any(isinstance(f, LoraLayer) for f in fronts(model)):
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading the first adapter "
            "and before loading the second adapter."
        )
    for module in model.modules():
        for name in module.names if isinstance(module, LoraLayer) and target_rank else ():
            adapter: Any = module.slot[name]
            for key, dim in (("A", 0), ("B", 1)):
                p = getattr(adapter, key)
                if p.shape[dim] > target_rank:  # type: ignore[operator]
                    raise ValueError(
                        f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger ({p.shape[dim]}). "
                        "This is not possible."
                    )
                shape = [target_rank if i == dim else s for i, s in enumerate(p.shape)]
                wide = p.new_zeros(shape)
                wide[tuple(slice(0, s) for s in p.shape)] = p.data
                adapter._parameters[key] = nn.Parameter(wide, requires_grad=p.requires_grad)
