"""LayerNorm tuning in the layout of peft's adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from weft.adapters.formats.base import COMMON, Format, checked, short_names
from weft.adapters.formats.common import targets
from weft.core import Adapter, Method
from weft.methods import LNTuning
from weft.methods.ln_tuning import TunedNorm

NAMES: dict[type[Adapter], dict[str, str]] = {TunedNorm: {n: f"ln_tuning_layers.{n}" for n in ("weight", "bias")}}

def _write(method: LNTuning, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    return {"target_modules": short_names(model, adapters), "exclude_modules": None}


def _read(config: Mapping[str, Any]) -> Method:
    checked(config, COMMON, "LayerNorm tuning")
    return LNTuning(**targets(config))


FORMATS: dict[type[Method], Format] = {LNTuning: Format("LN_TUNING", _write, _read, COMMON)}
