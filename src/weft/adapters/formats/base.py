"""What the files of a method consist of; and weft's own form, for methods that peft does not have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from weft.core import Adapter, Method, WeftError, modules

PREFIX = "base_model.model."
OWN = "WEFT_"  # what peft has no type for: the method as it is, and its parameters under their own names (whole ones as modules_to_save)


@dataclass(frozen=True)
class Format:
    """How one method is written: `write` gives its part of adapter_config.json, `read` the method that a configuration means."""

    peft_type: str
    write: Callable[[Any, nn.Module, Mapping[str, Adapter]], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], Method]
    fields: Mapping[str, Field] = field(default_factory=dict)  # what weft does with each field of peft's configuration
    claims: Callable[[Mapping[str, Any]], bool] = lambda config: True  # which configurations of this type are meant: LORA is several
    stored: Callable[[Any, str, Tensor], Tensor] = lambda adapter, parameter, tensor: tensor  # one parameter as it stands in the file
    beside: tuple[str, ...] = ()  # names of tensors that belong to all layers and may stand in the file
    give: Callable[[Mapping[str, Adapter]], dict[str, Tensor]] = lambda adapters: {}  # those tensors
    take: Callable[[Mapping[str, Adapter], Mapping[str, Tensor]], None] = lambda adapters, tensors: None  # the reverse
    keeps: bool = True  # whether peft's configuration of this type has modules_to_save
    root: str = PREFIX  # what stands before the paths of layers
    told: Callable[[Any, Collection[str]], Method] = lambda method, names: method  # which one is meant, with the tensors' names known too
    noted: tuple[str, ...] = ()  # hyper-parameters that peft has no field for: they stand in the header of the tensors' file (notes.py)


@dataclass(frozen=True)
class Field:
    """What becomes of one field of a configuration.

    Args:
        weft: The hyper-parameter that holds it.
        why: If there is none: why it may be passed over, or why a value other than `neutral` is refused.
        neutral: The value with which it changes nothing.
        refused: Whether other values are refused. (They also pass if they are None, False or empty.)
    """

    weft: str = ""
    why: str = ""
    neutral: Any = None
    refused: bool = False


COMMON: dict[str, Field] = {
    "peft_type": Field("the method"),
    "task_type": Field(why="written from the model's class, and compared with it when a file is loaded"),
    "target_modules": Field("targets"),
    "exclude_modules": Field("exclude"),
    "modules_to_save": Field("modules_to_save"),
    "inference_mode": Field(why="an adapter that is loaded can be trained on"),
    "base_model_name_or_path": Field(why="written from the model; the caller says which base is used"),
    "revision": Field(why="belongs to base_model_name_or_path"),
    "auto_mapping": Field(why="written from the model's class where it has no task type"),
    "peft_version": Field(why="says who wrote the file"),
    "runtime_config": Field(why="about peft's own running, never about numbers"),
}


def checked(config: Mapping[str, Any], fields: Mapping[str, Field], what: str) -> None:
    """Raise WeftError with every field that holds what weft does not compute."""
    wrong = [
        f"{name}={config[name]!r} ({f.why})"
        for name, f in fields.items()
        if f.refused and config.get(name, f.neutral) not in (f.neutral, None, False) and config[name] not in ([], {})
    ]
    if wrong:
        raise WeftError(f"this {what} uses what weft does not compute: " + ", ".join(wrong))


def unknown(config: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The fields that this version does not know and that say something: those of a newer peft. They are kept, and written back."""
    return {k: v for k, v in config.items() if k not in fields and v not in (None, False, [], {})}


def own_format(method: type[Method]) -> Format:
    """The form of a method that peft does not have."""
    return Format(f"{OWN}{method.__name__.upper()}", _write_any, _read_any, COMMON | {"method": Field("the method")})


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
