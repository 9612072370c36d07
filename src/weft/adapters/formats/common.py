"""What the configurations of peft's methods have in common: how they name layers, and which fields say nothing about the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.core import WeftError

HARMLESS = {  # where an adapter came from
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type", "runtime_config",
    "fan_in_fan_out", "modules_to_save",
}  # fmt: skip


def names(given: Any) -> str | tuple[str, ...]:
    """peft's list of names, regular expression, or "all-linear", as weft writes them. Raises WeftError where there are none."""
    if not given:
        raise WeftError("adapter_config.json names no target_modules")
    if isinstance(given, str):
        return given if given == "all-linear" else f"re:{given}"
    return tuple(sorted(given))


def targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`targets` and `exclude` of a method, from a configuration's target_modules and exclude_modules."""
    exclude = config.get("exclude_modules")
    return {"targets": names(config.get("target_modules")), "exclude": names(exclude) if exclude else ()}


def check(config: Mapping[str, Any], read: set[str], neutral: Mapping[str, Any]) -> None:
    """Raise WeftError, naming every field that changes what is computed in a way that weft does not have.

    Args:
        read: Fields that the caller understands. neutral: Fields that it accepts only with this value, or empty.
    """
    empty: tuple[Any, ...] = (None, False, [], {})
    wrong = [f"{k}={config[k]!r}" for k, v in neutral.items() if config.get(k, v) != v and config[k] not in empty]
    known = set(neutral) | HARMLESS | read | {"target_modules", "exclude_modules"}
    wrong += [f"{k}={config[k]!r} (unknown)" for k in sorted(set(config) - known) if config[k] not in empty]
    if wrong:
        raise WeftError(f"this {config.get('peft_type')} adapter uses what weft does not compute: " + ", ".join(wrong))
