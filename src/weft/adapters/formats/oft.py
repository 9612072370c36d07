"""OFT in the layout of peft's adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from weft.adapters.formats.base import COMMON, Field, Format, checked, short_names
from weft.adapters.formats.common import LAYERS, OFTEN, targets
from weft.core import Adapter, Method, WeftError, is_conv1d
from weft.methods import OFT
from weft.methods.oft import Rotation

NAMES: dict[type[Adapter], dict[str, str]] = {Rotation: {"R": "oft_R.weight"}}
_SAME = ("module_dropout", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
FIELDS: dict[str, Field] = COMMON | LAYERS | OFTEN | {k: Field(k) for k in _SAME} | {
    "r": Field("blocks"), "oft_block_size": Field("block_size"), "bias": Field(why="not yet", neutral="none", refused=True),
}  # fmt: skip


def _write(method: OFT, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    return {
        "r": method.blocks, "oft_block_size": method.block_size, "bias": "none", "init_weights": True,
        "target_modules": short_names(model, adapters), "exclude_modules": None, "layers_to_transform": None,
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(p)) for p in adapters),
        "peft_version": "0.18.0",  # since when the series has been this one: without it peft warns
    } | {name: getattr(method, name) for name in _SAME}  # fmt: skip


def _read(config: Mapping[str, Any]) -> Method:
    checked(config, FIELDS, "OFT")
    if "oft_block_size" not in config:
        raise WeftError("this OFT adapter was made by peft 0.13 or before, which meant another parametrisation: peft cannot load it either")
    values = {name: config[name] for name in _SAME if name in config}
    return OFT(block_size=config["oft_block_size"], blocks=config.get("r", 0), **targets(config), **values)


FORMATS: dict[type[Method], Format] = {OFT: Format("OFT", _write, _read, FIELDS)}
