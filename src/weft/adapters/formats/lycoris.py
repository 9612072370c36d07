"""LoHa and LoKr in the layout of peft's adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from weft.adapters.formats.base import COMMON, Field, Format, checked, short_names, whole
from weft.adapters.formats.common import LAYERS, OFTEN, targets
from weft.core import Adapter, Method
from weft.methods import LoHa, LoKr
from weft.methods.loha import Hadamard
from weft.methods.lokr import Kronecker

NAMES: dict[type[Adapter], dict[str, str]] = {
    Hadamard: {k: f"hada_{k if k[0] == 't' else f'w{k[1]}_{k[0]}'}" for k in ("t1", "t2", "a1", "b1", "a2", "b2")},
    Kronecker: {k: f"lokr_{k}" for k in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_SAME = ("rank_dropout", "module_dropout", "use_effective_conv2d")  # called the same in both
_KRON = ("decompose_both", "decompose_factor", "rank_dropout_scale")
_MINE = {"r": "rank", "alpha": "alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
LOHA: dict[str, Field] = COMMON | LAYERS | OFTEN | {k: Field(v) for k, v in _MINE.items()} | {k: Field(k) for k in _SAME}
LOKR: dict[str, Field] = LOHA | {k: Field(k) for k in _KRON}


def _write(method: LoHa, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    same = _SAME + (_KRON if isinstance(method, LoKr) else ())
    return {
        "r": method.rank, "alpha": whole(method.alpha), "init_weights": True, "layers_to_transform": None,
        "target_modules": short_names(model, adapters), "exclude_modules": None,
        "rank_pattern": dict(method.rank_pattern), "alpha_pattern": dict(method.alpha_pattern),
    } | {name: getattr(method, name) for name in same}  # fmt: skip


def _read(cls: type[LoHa], same: tuple[str, ...], config: Mapping[str, Any]) -> Method:
    checked(config, LOKR, cls.__name__)
    values = {name: config[name] for name in same if name in config}
    return cls(
        rank=config.get("r", 8), alpha=float(config.get("alpha", 8)), rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}), **targets(config), **values,
    )  # fmt: skip


FORMATS: dict[type[Method], Format] = {
    LoHa: Format("LOHA", _write, lambda config: _read(LoHa, _SAME, config), LOHA),
    LoKr: Format("LOKR", _write, lambda config: _read(LoKr, _SAME + _KRON, config), LOKR),
}
