"""What of AdaLoRA's ranks stands in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.adapters.formats.adalora import left
from weft.core import Adapter


def resized(config: Any, parts: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors without the triplets that were dropped, and `config.rank_pattern` saying which are there.

    As in peft nothing is left out before the ranks were shared out once. A triplet whose λ grew again since it was dropped stays.
    """
    if config.rank_pattern is None:
        return dict(tensors)
    found, pattern = dict(tensors), {}
    given = {k.partition(".lora_E")[0]: v for k, v in config.rank_pattern.items()}
    for path, adapter in parts.items():
        inner, stay = path.removeprefix("base_model.model."), left(adapter)  # type: ignore[arg-type]
        for part in ("A", "B", "E"):
            key = f"{path}.lora_{part}"
            found[key] = found[key][:, stay] if part == "B" else found[key][stay]
        told = stay.tolist() + [False] * (config.init_r - len(stay))
        pattern[f"{inner}.lora_E"] = given[inner] if inner in given and sum(given[inner]) == sum(told) and len(stay) < len(told) else told
    config.rank_pattern = pattern
    return found
