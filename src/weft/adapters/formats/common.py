"""What the configurations of many of peft's methods have in common: how they name layers, and fields that stand in most of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.adapters.formats.base import Field
from weft.core import WeftError

_NOT_YET = Field(why="not yet", refused=True)
START = Field(why="about how training began: nothing that a trained adapter computes")
OFTEN: dict[str, Field] = {
    "layers_to_transform": _NOT_YET,
    "layers_pattern": _NOT_YET,
    "fan_in_fan_out": Field(why="weft sees from the layer how its weight lies"),
    "init_weights": START,
}


def names(given: Any) -> str | tuple[str, ...]:
    """peft's list of names, regular expression, or "all-linear", as weft writes them."""
    if isinstance(given, str):
        return given if given == "all-linear" else f"re:{given}"
    return tuple(sorted(given or ()))


def targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`targets` and `exclude` of a method, from a configuration's target_modules and exclude_modules. The first must be there."""
    if not config.get("target_modules") and not config.get("target_parameters"):
        raise WeftError("adapter_config.json names no target_modules")
    return {"targets": names(config.get("target_modules")), "exclude": names(config.get("exclude_modules"))}
