"""From peft's configurations to weft's methods. What each field becomes is decided where weft reads peft's files (`adapters/formats`)."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from weft.adapters.formats import format_for
from weft.compat.peft import starts
from weft.compat.peft.kinds import as_value_error
from weft.core import Method
from weft.methods import LoRA

# Which layers, which modules whole, which biases: chosen by this face, after peft's own rules, before the method is asked to build.
_CHOSEN_HERE: dict[str, Any] = {
    "exclude_modules": None, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "bias": "none",
    "layer_replication": None,
}  # fmt: skip


def method_of(config: Any, targets: list[str]) -> Method:
    """The method that a configuration means. Raises FaceError for what weft does not compute."""
    values: dict[str, Any] = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.to_dict().items()}
    values |= {k: v for k, v in _CHOSEN_HERE.items() if k in values}
    kind = getattr(config.peft_type, "value", config.peft_type)
    values |= {"peft_type": kind, "target_modules": targets}
    for name in ("r", "init_r"):
        if name in values and isinstance(values[name], int) and values[name] <= 0 and kind != "OFT":
            raise ValueError(f"`r` should be a positive integer value but the value passed is {values[name]}")
    with as_value_error():
        method = format_for(values).read(values | ({"init_lora_weights": True} if "init_lora_weights" in values else {}))
        start = getattr(config, "init_lora_weights", True)
        if isinstance(method, LoRA) and isinstance(start, str):
            method = replace(method, init=start.lower()) if start.lower() in starts.PLAIN else method
    return method


def has(method: Method, name: str) -> bool:
    """Whether a method has a hyper-parameter of this name."""
    return any(f.name == name for f in fields(method))
