"""bitsandbytes' checkpoints, without bitsandbytes: 4-bit weights read and written under its keys, LLM.int8 weights read.

For a layer `m`, where it has them: m.weight (uint8, (bytes, 1)), m.weight.absmax, m.weight.quant_map, m.weight.nested_absmax,
m.weight.nested_quant_map, and m.weight.quant_state.bitsandbytes__nf4, which is JSON in bytes. LLM.int8: m.weight (int8) and m.SCB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.core import WeftError
from weft.kernels.four_bit import NESTED, block_size, dynamic, table
from weft.quant.formats import format_of
from weft.quant.four_bit import BLOCKS

STATE = ".quant_state.bitsandbytes__"
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stored:
    """A packed weight out of a file."""

    base: str
    tensors: dict[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype  # of the weight before it was packed


def packed_keys(keys: Any) -> dict[str, list[str]]:
    """Weights that bitsandbytes packed -> all keys of each, among the keys of a checkpoint. Raises WeftError for a scheme that it lacks."""
    have = set(keys)
    found: dict[str, list[str]] = {}
    for key in sorted(have):
        weight, mark, scheme = key.partition(STATE)
        if mark:
            if scheme not in ("nf4", "fp4"):
                raise WeftError(f"{weight} is packed as bitsandbytes' {scheme!r}, which weft does not know: it reads nf4 and fp4")
            found[weight] = [k for k in (weight, *(weight + b for b in BESIDE), key) if k in have]
        elif key.endswith(".SCB"):
            found[key.removesuffix("SCB") + "weight"] = [key.removesuffix("SCB") + "weight", key]
    return found


def state_of(weight: str, stored: Tensor) -> dict[str, Any]:
    """What the JSON beside a 4-bit weight says: its kind, shape, block size and dtype. Raises WeftError if it is damaged."""
    try:
        state: dict[str, Any] = json.loads(bytes(stored.cpu().tolist()).decode("utf-8"))
        return state | {"shape": torch.Size(state["shape"]), "blocksize": int(state["blocksize"]), "dtype": getattr(torch, state["dtype"])}
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise WeftError(f"{weight}: its quantisation state is damaged or incomplete ({type(e).__name__}: {e})") from e


def read(weight: str, tensors: Mapping[str, Tensor]) -> Stored:
    """One packed weight from the tensors under its keys (those of `packed_keys`), rearranged but not converted.

    Raises:
        WeftError: a tensor is missing or of a wrong size, another table of levels, a block size that does not exist.
    """
    if (stem := weight.removesuffix("weight")) + "SCB" in tensors:
        return _read_int8(weight, tensors[weight], tensors[stem + "SCB"])
    mark = next((k for k in tensors if k.startswith(weight + STATE)), None)
    if mark is None:
        raise WeftError(f"{weight}: there is no {STATE[1:]}nf4 or ...fp4 beside it, so it is not a 4-bit weight of bitsandbytes")
    kind = mark.partition(STATE)[2]
    form = format_of(kind)
    state = state_of(weight, tensors[mark])
    shape, block, dtype, nested = state["shape"], state["blocksize"], state["dtype"], "nested_offset" in state
    need = [weight, weight + ".absmax", *([weight + ".nested_absmax", weight + ".nested_quant_map"] if nested else [])]
    if gone := [k for k in need if k not in tensors]:
        raise WeftError(f"{weight}: its quantisation state is damaged or incomplete (there is no {', '.join(gone)})")
    packed, absmax, *second = (tensors[k] for k in need)
    numel, blocks = shape.numel(), -(-shape.numel() // block) if block else 0
    wrong = []
    if block not in BLOCKS:
        wrong.append(f"a block size of {block}, where there are {', '.join(map(str, BLOCKS))}")
    elif packed.numel() * packed.element_size() != (numel + 1) // 2 or absmax.numel() != blocks:
        has, should = packed.numel() * packed.element_size(), (numel + 1) // 2
        wrong.append(f"{has} bytes and {absmax.numel()} scales, where a weight of {tuple(shape)} has {should} and {blocks}")
    given = tensors.get(weight + ".quant_map")
    if given is not None and not torch.equal(given.cpu().float(), table(kind, _CPU)):
        wrong.append(f"a table of levels that is not {kind}'s")
    if nested and (state.get("nested_blocksize") != NESTED or not torch.equal(second[1].cpu().float(), dynamic(_CPU))):
        wrong.append("scales that are quantised otherwise than in blocks of 256 with the dynamic map")
    if wrong:
        raise WeftError(f"{weight} has {'; and '.join(wrong)}")
    flat = packed.contiguous().view(-1).view(torch.uint8)  # quant_storage may have been bf16: the bytes are the same
    found = {"weight": _rows(flat, shape, 2), "absmax": _rows(absmax.reshape(-1), shape, block)}
    if nested:  # the offset is written as a double; it must be fp32 whatever torch's default dtype is
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
        found |= {"nested_absmax": second[0].float().reshape(-1), "nested_offset": offset}
    assert block_size(numel, blocks) == block or blocks == 1
    return Stored(form.name, found, shape, dtype)


def write(weight: str, base: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a packed weight under bitsandbytes' keys. Raises WeftError for a format that bitsandbytes does not have."""
    if base not in ("nf4", "fp4"):
        raise WeftError(f"{weight} is packed as {base}, and bitsandbytes' checkpoints hold nf4 and fp4: quantise to one of those")
    absmax, numel = tensors["absmax"].reshape(-1), torch.Size(shape).numel()
    state: dict[str, Any] = {"quant_type": base, "blocksize": block_size(numel, len(absmax)), "dtype": str(dtype).removeprefix("torch."),
                             "shape": list(shape)}  # fmt: skip
    if len(absmax) == 1:  # all that is known of the block size is that it holds the weight
        state["blocksize"] = next(b for b in BLOCKS[1:] if b >= numel)
    levels = table(base, absmax.device).clone()  # a file may not share tensors
    found = {weight: tensors["weight"].reshape(-1, 1), f"{weight}.absmax": absmax, f"{weight}.quant_map": levels}
    if "nested_absmax" in tensors:
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": tensors["nested_offset"].item()}
        found[f"{weight}.nested_absmax"] = tensors["nested_absmax"]
        found[f"{weight}.nested_quant_map"] = dynamic(absmax.device).clone()
    found[f"{weight}{STATE}{base}"] = torch.tensor(list(json.dumps(state).encode("utf-8")), dtype=torch.uint8)
    return found


def config(base: str, nested: bool, skipped: list[str], compute: str = "bfloat16") -> dict[str, Any]:
    """The `quantization_config` of config.json beside such weights; `skipped`: linear layers that are not packed."""
    return {
        "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": compute, "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": base, "bnb_4bit_use_double_quant": nested, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": skipped or None, "llm_int8_threshold": 6.0, "load_in_4bit": True,
        "load_in_8bit": False, "quant_method": "bitsandbytes",
    }  # fmt: skip


def _rows(flat: Tensor, shape: torch.Size, each: int) -> Tensor:
    """Rows of the weight as rows, where they come out even."""
    return flat.view(*shape[:-1], shape[-1] // each) if shape[-1] % each == 0 else flat


def _read_int8(weight: str, packed: Tensor, SCB: Tensor) -> Stored:
    if packed.dtype != torch.int8 or packed.dim() != 2 or SCB.numel() != packed.shape[0]:
        shape = tuple(packed.shape)
        raise WeftError(f"{weight} is {packed.dtype} of {shape} with {SCB.numel()} scales, where LLM.int8 has int8 and one for a row")
    return Stored("int8", {"weight": packed, "scale": SCB.float().view(-1, 1) / 127}, packed.shape, torch.float16)
