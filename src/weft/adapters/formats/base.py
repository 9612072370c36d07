"""What the files of a method consist of; and weft's own form, for methods that peft does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from weft.core import Adapter, Method, WeftError, modules

PREFIX = "base_model.model."
OWN = "WEFT_"  # what peft has no type for: the method as it is, and its parameters under their own names (whole ones as modules_to_save)


@dataclass(frozen=True)
class Format:
    """How one method is written: `write` gives its part of adapter_config.json, `read` the method that a configuration means."""

    peft_type: str
    write: Callable[[Any, nn.Module, Mapping[str, Adapter]], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], Method]


def own_format(method: type[Method]) -> Format:
    """The form of a method that peft does not have."""
    return Format(f"{OWN}{method.__name__.upper()}", _write_any, _read_any)


def _write_any(method: Method, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    return {"target_modules": sorted(adapters), "method": method.to_dict()}


def _read_any(config: Mapping[str, Any]) -> Method:
    if not isinstance(config.get("method"), dict):
        raise WeftError("adapter_config.json does not hold the method's hyper-parameters under 'method'")
    return Method.from_dict(config["method"])


def short_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The fewest names that peft's suffix rule resolves to exactly these paths: the last parts if they do, else the paths whole."""
    wanted = set(paths)
    ends = {p.rpartition(".")[2] for p in wanted}
    hit = sum(p.rpartition(".")[2] in ends for p, _ in modules(model))
    return sorted(ends) if hit == len(wanted) else sorted(wanted)


def whole(x: float) -> float:
    """peft writes 16, not 16.0."""
    return int(x) if float(x).is_integer() else x
