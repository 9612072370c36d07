"""Checkpoints that are quantised already: which of their tensors belong together, and what weight they stand for.

| in the file, for a weight P | what wrote it | format |
|---|---|---|
| P, P.absmax, P.quant_state.bitsandbytes__nf4 or __fp4, nested: P.nested_absmax | bitsandbytes, and weft | nf4, fp4 |
| P (int8), its module's SCB | bitsandbytes' LLM.int8; the rows with outliers are not treated apart here | int8 |
| P (e4m3), P_scale_inv | DeepSeek, Qwen: tiles of 128 × 128 | fp8-block |
| P_blocks, P_scales | gpt-oss | mxfp4 |
| P, P.scale | weft | int8, fp8, fp8-block |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.core import WeftError
from weft.models.shards import Shards
from weft.quant import FORMATS, bitsandbytes, format_of

METHODS = ("bitsandbytes", "fp8", "mxfp4", "weft")  # `quant_method` of a configuration, what weft reads


@dataclass(frozen=True)
class Stored:
    """A packed weight in a file: its format, its shape as numbers, and how to read its tensors."""

    base: str
    shape: torch.Size
    tensors: Callable[[], dict[str, Tensor]]

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return format_of(self.base).unpack(self.tensors(), self.shape, dtype)


def method_of(config: Mapping[str, Any], name: object) -> str | None:
    """The scheme that a configuration (as read from config.json) says its weights are in, None for plain ones.

    Raises WeftError for one that weft cannot read.
    """
    given = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not given:
        return None
    method = str(given.get("quant_method", "") or ("bitsandbytes" if "load_in_4bit" in given else "nothing"))
    if method not in METHODS:
        raise WeftError(
            f"{name} is quantised by {method!r}, which weft cannot read. It reads plain safetensors and those of {', '.join(METHODS)}: "
            "take the 16-bit checkpoint, and give base='nf4' to have it quantised while it loads"
        )
    tile = given.get("weight_block_size")
    if method == "fp8" and tile is not None and list(tile) != [128, 128]:
        raise WeftError(f"{name} is in fp8 with tiles of {tile}, and weft reads tiles of [128, 128]: take the 16-bit checkpoint")
    return method


def find(shards: Shards, method: str | None) -> tuple[dict[str, Stored], list[str]]:
    """(the packed weights of a checkpoint by name, the names of its plain tensors). Raises WeftError for packed ones of no known layout."""
    if method is None:
        return {}, list(shards)
    found: dict[str, Stored] = {}
    used: set[str] = set()

    def take(name: str, base: str, shape: Any, read: Callable[[], dict[str, Tensor]], *keys: str) -> None:
        if base not in FORMATS:
            raise WeftError(f"{name} is stored as {base}, which this version of weft cannot read")
        found[name] = Stored(base, torch.Size(shape), read)
        used.update(k for k in keys if k in shards)

    for name, keys in bitsandbytes.packed_keys(shards).items():
        mark = next((k for k in keys if bitsandbytes.STATE in k), None)
        base, shape = "int8", shards[name].shape
        if mark is not None:
            base, shape = mark.partition(bitsandbytes.STATE)[2], bitsandbytes.state_of(name, shards.read(mark))["shape"]
        take(name, base, shape, _theirs(shards, name, keys), *keys, f"{name}_format")  # LLM.int8 says there how its rows lie
    for key, place in shards.items():
        if key in used:
            continue
        if key.endswith("_scale_inv"):
            name = key.removesuffix("_scale_inv")
            take(name, "fp8-block", shards[name].shape, _pair(shards, name, key, Tensor.float), name, key)
        elif key.endswith("_blocks") and f"{key.removesuffix('_blocks')}_scales" in shards:
            name, (*lead, rows, groups, _) = key.removesuffix("_blocks"), place.shape
            other = f"{name}_scales"
            take(name, "mxfp4", (*lead, groups * 32, rows), _pair(shards, key, other, _as_it_is), key, other)
        elif method == "weft" and key.endswith(".scale") and (name := key.removesuffix(".scale")) in shards:
            stored = shards[name].dtype
            tiled = shards[name].shape[:-1] != place.shape[:-1]
            base = "int8" if stored == torch.int8 else "fp8-block" if tiled else "fp8"
            take(name, base, shards[name].shape, _pair(shards, name, key, _as_it_is), name, key)
    plain = [k for k in shards if k not in used]
    if strange := [k for k in plain if shards[k].dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8) and k.endswith(".weight")]:
        raise WeftError(f"{len(strange)} weights are packed in a layout of {method!r} that weft cannot read: {', '.join(strange[:3])}")
    return found, plain


def _as_it_is(t: Tensor) -> Tensor:
    return t


def _pair(shards: Shards, name: str, scale: str, change: Callable[[Tensor], Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"weight": shards.read(name), "scale": change(shards.read(scale))}


def _theirs(shards: Shards, name: str, keys: list[str]) -> Callable[[], dict[str, Tensor]]:
    return lambda: bitsandbytes.read(name, {k: shards.read(k) for k in keys}).tensors


def to_file(name: str, base: str, shape: torch.Size, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a packed weight under the names of the table above, on the CPU: what `find` reads, bit for bit."""
    held = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    if base in ("nf4", "fp4"):
        return bitsandbytes.write(name, base, held, shape, dtype)
    return {name: held["weight"].view(getattr(format_of(base), "stored", torch.uint8)), f"{name}.scale": held["scale"]}
