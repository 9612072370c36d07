"""Four-bit codes with a scale for each block, to numbers: w = table[code] · absmax[block], in fp32, rounded once.

The layout is that of bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314): the weight lies flat, row by row; the first of two
neighbours has the high half of a byte; blocks run over the flat weight, so they may straddle rows, and the last one may be short. With
double quantisation absmax is a byte itself: scale = dynamic[absmax] · nested_absmax[block // 256] + nested_offset, two fp32 operations.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
from torch import Tensor

from weft.kernels.launch import kernels, usable
from weft.kernels.scratch import real

# fmt: off
# The levels of NF4 are written out: the formula of the paper gives 10 of the 16 bit for bit at best, whoever computes the quantiles.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# bitsandbytes' own FP4, a sign and an odd e2m1: not that of the OCP standard, and not in order of size.
FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
       -0.0, -0.0052083333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25)
# fmt: on
TABLES = {"nf4": NF4, "fp4": FP4}
NESTED = 256  # scales that share a second scale
_STRIDE = 1 << 22  # weights a CPU decodes at once, 16 MiB of fp32: in each parallel operation two threads on a busy machine wait


@cache
def table(kind: str, device: torch.device) -> Tensor:
    """(16,) fp32: the value of each code."""
    with torch.inference_mode(False):
        return torch.tensor(TABLES[kind], dtype=torch.float32).to(device)


@cache
def pairs(kind: str, device: torch.device) -> Tensor:
    """(256,) int64: the two fp32 values in a byte, side by side as eight bytes. A look-up moves whole elements, not rows of two."""
    with torch.inference_mode(False):
        values = torch.tensor(TABLES[kind], dtype=torch.float32)
        return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1).view(torch.int64).view(-1).to(device)


@cache
def dynamic(device: torch.device) -> Tensor:
    """(256,) fp32, sorted: the signed 8-bit dynamic map (Dettmers 2016, arXiv:1511.04561) of scales.

    In each of seven decades from 1e-6 to 1 the midpoints of 2^i equal parts of [0.1, 1], with both signs; and 0, and 1.
    """
    with torch.inference_mode(False):
        parts = []
        for i in range(7):
            edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
            parts.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
        positive = torch.cat(parts)
        return torch.cat([-positive, torch.zeros(1), positive, torch.ones(1)]).sort().values.to(device)


def block_size(numel: int, blocks: int) -> int:
    """The weights of one block, a power of two from 32, found from the number of blocks; it is the only one that fits."""
    block = 32
    while -(-numel // block) > blocks:
        block *= 2
    return block


def scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """(blocks,) fp32, whether absmax holds them (fp32) or bytes of the dynamic map."""
    flat = absmax.reshape(-1)
    if nested_absmax is None or nested_offset is None:
        return flat
    values = dynamic(flat.device).index_select(0, flat.int())
    second = nested_absmax.reshape(-1).repeat_interleave(NESTED)[: len(values)]
    return values * second + nested_offset


def dequantise_4bit_reference(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, kind: str, out: Tensor
) -> Tensor:
    """Fills `out`, any shape and dtype, and returns it. A CPU goes piece by piece, so that what lies between stays in its cache."""
    numel = out.numel()
    block = block_size(numel, absmax.numel())
    scale, lut, flat, whole = scales(absmax, nested_absmax, nested_offset), pairs(kind, packed.device), packed.reshape(-1), out.view(-1)
    step = max(_STRIDE, block) if packed.device.type == "cpu" else numel
    there = out.dtype == torch.float32 and numel % 2 == 0 and out.storage_offset() % 2 == 0  # pairs may be written where they will stay
    room = whole if there else torch.empty(min(step, numel + numel % 2), dtype=torch.float32, device=out.device)
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        codes, mine = flat[start // 2 : (stop + 1) // 2], scale[start // block : -(-stop // block)]
        values = room[start:stop] if there else room[: 2 * len(codes)]
        torch.index_select(lut, 0, codes.int(), out=values.view(torch.int64))
        if len(values) == len(mine) * block:
            values.view(-1, block).mul_(mine[:, None])
        else:
            values *= mine.repeat_interleave(block)[: len(values)]
        if not there:
            whole[start:stop].copy_(values[: stop - start])
    return out


def dequantise_4bit(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, kind: str, shape: tuple[int, ...],
    dtype: torch.dtype, out: Tensor | None = None, again: bool = False,
) -> Tensor:  # fmt: skip
    """The weight as numbers.

    Args:
        packed: uint8, two codes a byte, any shape.
        absmax: fp32, or uint8 with nested_absmax (fp32, one for 256 blocks) and nested_offset (fp32, ()).
        kind: "nf4" or "fp4". shape, dtype: Of the result. out: Where to write it; contiguous.
        again: Set in a backward pass. It only makes the call another one than the forward pass's, so that a compiler does not keep the
            whole weight from one to the other.
    """
    if not real(packed):
        made = _op(packed, absmax, nested_absmax, nested_offset, kind, list(shape), dtype, again)
        return made if out is None else out.copy_(made)
    out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    if usable(packed):
        block, place = block_size(out.numel(), absmax.numel()), packed.device
        luts = table(kind, place), dynamic(place)
        return kernels().dequantise_4bit_triton(packed, absmax, nested_absmax, nested_offset, *luts, out, block)
    return dequantise_4bit_reference(packed, absmax, nested_absmax, nested_offset, kind, out)


@torch.library.custom_op("weft::dequantise_4bit", mutates_args=())
def _op(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, kind: str, shape: list[int],
    dtype: torch.dtype, again: bool,
) -> Tensor:  # fmt: skip
    return dequantise_4bit(packed, absmax, nested_absmax, nested_offset, kind, tuple(shape), dtype)


@_op.register_fake
def _(packed, absmax, nested_absmax, nested_offset, kind, shape, dtype, again):  # type: ignore[no-untyped-def]
    assert prod(shape) <= 2 * packed.numel()
    return packed.new_empty(shape, dtype=dtype)
