"""What the configurations of many of peft's methods have in common: how they name layers, and fields that stand in most of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.adapters.formats.base import Field
from weft.core import WeftError

NOWHERE = "dummy-target-modules"  # what peft has for target_modules where only modules_to_save are meant
START = Field(why="about how training began: nothing that a trained adapter computes")
LAYERS: dict[str, Field] = {name: Field(name) for name in ("layers_to_transform", "layers_pattern")}
OFTEN: dict[str, Field] = {
    "fan_in_fan_out": Field(why="weft sees from the layer how its weight lies"),
    "init_weights": START,
}


def names(given: Any) -> str | tuple[str, ...]:
    """peft's list of names, regular expression, or "all-linear", as weft writes them."""
    if given == NOWHERE:
        return ()
    if isinstance(given, str):
        return given if given == "all-linear" else f"re:{given}"
    return tuple(sorted(given or ()))


def targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers a configuration means, as hyper-parameters of a method. Its target_modules must be there."""
    if not config.get("target_modules") and not config.get("target_parameters"):
        raise WeftError("adapter_config.json names no target_modules")
    chosen: dict[str, Any] = {"targets": names(config.get("target_modules")), "exclude": names(config.get("exclude_modules"))}
    layers = config.get("layers_to_transform")
    if layers not in (None, []) and not isinstance(config.get("target_modules"), str):  # a single number may be 0; peft heeds it so
        chosen |= {"layers_to_transform": layers, "layers_pattern": config.get("layers_pattern") or ()}
    return chosen
