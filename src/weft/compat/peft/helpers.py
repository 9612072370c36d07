"""peft's helpers: for models with packed or mixed dtypes, for scales, for checks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from weft.compat.peft.config import PeftConfig
from weft.compat.peft.layers import fronts
from weft.compat.peft.layers_lora import LoraLayer
from weft.compat.peft.switching import set_requires_grad


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a base, bring its 16-bit parameters to fp32, and for a quantised one switch gradient checkpointing on."""
    how = gradient_checkpointing_kwargs or {}
    packed = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    other = getattr(model, "quantization_method", None) in ("gptq", "aqlm", "eetq", "hqq", "torchao")
    model.requires_grad_(False)
    if not other:
        for p in model.parameters():
            if p.dtype in (torch.float16, torch.bfloat16) and type(p).__name__ != "Params4bit":
                p.data = p.data.float()
    if (packed or other) and use_gradient_checkpointing:
        if how.get("use_reentrant", True):
            if hasattr(model, "enable_input_require_grads"):
                model.enable_input_require_grads()
            else:
                model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """What is frozen goes to `dtype`, what trains to fp32."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """(n, t) labels as a decoder's inputs: one to the right, -100 as padding."""
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or repository holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # noqa: BLE001 (whatever is wrong with it, it is no adapter)
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside, the updates of all LoRA adapters are multiplied by a number."""
    if not isinstance(multiplier, int | float):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    before = {f: dict(f.scaling) for f in fronts(model) if isinstance(f, LoraLayer)}
    if not before:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    try:
        for front, scales in before.items():
            for name, scale in scales.items():
                front.scaling[name] = scale * multiplier
        yield
    finally:
        for front, scales in before.items():
            for name, scale in scales.items():
                front.scaling[name] = scale


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """weft computes an update in the dtype of the layer's output and casts no input: nothing to switch off."""
    yield


def update_forward_signature(model: Any) -> None:
    """Let `inspect.signature(model.forward)` say what the base's forward takes."""
    shown = inspect.signature(model.forward)
    if "args" in shown.parameters and "kwargs" in shown.parameters:
        _like(model, "forward", model.get_base_model().forward)


def update_generate_signature(model: Any) -> None:
    """Let `inspect.signature(model.generate)` say what the base's generate takes."""
    if hasattr(model, "generate"):
        _like(model, "generate", model.get_base_model().generate)


def update_signature(model: Any, method: str = "all") -> None:
    """The signatures of forward, generate, or both."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def _like(model: Any, name: str, source: Any) -> None:
    kept = deepcopy(getattr(type(model), name))
    update_wrapper(kept, getattr(source, "__func__", source), assigned=("__doc__", "__name__", "__annotations__"))
    kept.__signature__ = inspect.signature(getattr(source, "__func__", source))
    setattr(model, name, kept.__get__(model, type(model)))


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight as (out, in), however it lies."""
    return weight.T if fan_in_fan_out else weight


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    parent, _, last = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), last


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    set_requires_grad(model, adapter_name, False)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The path of a module in a model; '' if it is not in it."""
    return next((n for n, m in model.named_modules() if m is reference_module), "")
