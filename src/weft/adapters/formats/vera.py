"""VeRA in the layout of peft's adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters.formats.base import COMMON, Field, Format, checked, short_names
from weft.adapters.formats.common import LAYERS, targets
from weft.core import Adapter, Method, WeftError, is_conv1d
from weft.methods import VeRA
from weft.methods.vera import Projection, Vectors

NAMES: dict[type[Adapter], dict[str, str]] = {Vectors: {"d": "vera_lambda_d", "b": "vera_lambda_b"}}
SHARED = ("base_model.vera_A", "base_model.vera_B")

FIELDS: dict[str, Field] = COMMON | LAYERS | {
    "r": Field("rank"),
    "vera_dropout": Field("dropout"),
    "d_initial": Field("d_initial"),
    "projection_prng_key": Field("seed"),
    "save_projection": Field("save_projection"),
    "init_weights": Field(why="how training began: nothing that a trained adapter computes"),
    "fan_in_fan_out": Field(why="weft sees from the layer how its weight lies"),
    "bias": Field(why="VeRA here trains vectors only; train biases with weft.BitFit beside it", neutral="none", refused=True),
}


def _write(method: VeRA, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    return {
        "r": method.rank, "vera_dropout": method.dropout, "d_initial": method.d_initial, "projection_prng_key": method.seed,
        "save_projection": method.save_projection, "bias": "none", "init_weights": True, "target_modules": short_names(model, adapters),
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(p)) for p in adapters),
    }  # fmt: skip


def _read(config: Mapping[str, Any]) -> VeRA:
    checked(config, FIELDS, "VeRA")
    return VeRA(
        rank=config.get("r", 256), dropout=float(config.get("vera_dropout", 0.0)), d_initial=float(config.get("d_initial", 0.1)),
        seed=int(config.get("projection_prng_key", 0)), save_projection=bool(config.get("save_projection", True)), **targets(config),
    )  # fmt: skip


def _shared(adapters: Mapping[str, Adapter]) -> Projection:
    return next(a.shared for a in adapters.values() if isinstance(a, Vectors))


def _give(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    kind: Any = next(iter(adapters.values())).method
    return dict(zip(SHARED, _shared(adapters).on(torch.device("cpu")), strict=True)) if kind.save_projection else {}


def _take(adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
    shared = _shared(adapters)
    if not tensors:
        shared.on(torch.device("cpu"))
        return
    A, B = (tensors.get(name) for name in SHARED)
    if A is None or B is None or (tuple(A.shape), tuple(B.shape)) != shared.shapes:
        found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise WeftError(f"VeRA's shared matrices in the file are {found}; this model with this configuration needs {shared.shapes}")
    shared.copies["cpu"] = A.float(), B.float()


FORMATS: dict[type[Method], Format] = {
    VeRA: Format("VERA", _write, _read, FIELDS, beside=SHARED, give=_give, take=_take),
}
