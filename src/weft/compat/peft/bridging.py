"""What transformers asks of peft when a model loads an adapter by itself (`model.load_adapter`): how names in the file become its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.core_model_loading import WeightRenaming

from weft.compat.peft.tuners_more import PREFIXES


def build_peft_weight_mapping(weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """The prefix goes, the adapter's name comes in; what the model renames is renamed."""
    kind = getattr(peft_config, "peft_type", None)
    prefixes = [PREFIXES[kind]] if kind in PREFIXES else sorted(set(PREFIXES.values()))
    return [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        *(WeightRenaming(rf"({re.escape(p)}[^\.]*)", rf"\1.{adapter_name}") for p in prefixes),
        *(c for c in weight_conversions or () if isinstance(c, WeightRenaming)),
    ]
