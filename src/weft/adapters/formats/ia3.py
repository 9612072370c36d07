"""(IA)³ in the layout of peft's adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from weft.adapters.formats.base import COMMON, Field, Format, checked, short_names
from weft.adapters.formats.common import OFTEN, START, names, targets
from weft.core import Adapter, Method, is_conv1d
from weft.methods import IA3
from weft.methods.ia3 import InputScale, OutputScale

NAMES: dict[type[Adapter], dict[str, str]] = {OutputScale: {"l": "ia3_l"}, InputScale: {"l": "ia3_l"}}
FIELDS: dict[str, Field] = COMMON | OFTEN | {"feedforward_modules": Field("feedforward"), "init_ia3_weights": START}


def _write(method: IA3, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    inside = {p for p, a in adapters.items() if isinstance(a, InputScale)}
    wanted, scaled = short_names(model, adapters), short_names(model, inside)
    if not set(scaled) <= set(wanted) or any(p.endswith(tuple(scaled)) for p in adapters if p not in inside):
        wanted, scaled = sorted(adapters), sorted(inside)  # peft wants the one to be among the other, and reads ends of paths
    return {
        "target_modules": wanted, "feedforward_modules": scaled, "exclude_modules": None, "init_ia3_weights": True,
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(p)) for p in adapters),
    }  # fmt: skip


def _read(config: Mapping[str, Any]) -> Method:
    checked(config, FIELDS, "IA3")
    return IA3(**targets(config), feedforward=names(config.get("feedforward_modules")))


FORMATS: dict[type[Method], Format] = {IA3: Format("IA3", _write, _read, FIELDS)}
