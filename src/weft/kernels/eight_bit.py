"""One byte a weight (int8 or fp8 e4m3) and a scale for each row, each 128 × 128 tile or the whole, to numbers.

    w = q · scale      in fp32, rounded once
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.launch import kernels, usable
from weft.kernels.scratch import real

TILE = 128  # rows and columns that share a scale in DeepSeek's and Qwen's fp8 checkpoints


def tiles(shape: tuple[int, ...], scale: Tensor) -> tuple[int, int]:
    """(rows, columns) of the weight for which one scale holds, from the shapes: (1, all), (128, 128) or everything."""
    rows, columns = shape[-2:]
    if scale.numel() == 1:
        return rows, columns
    if scale.shape[-2:] == (rows, 1):
        return 1, columns
    return TILE, TILE


def dequantise_8bit_reference(packed: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Fills `out` (..., rows, columns) and returns it."""
    high, wide = tiles(tuple(out.shape), scale)
    full = scale.float()
    if high > 1 and scale.numel() > 1:
        full = full.repeat_interleave(high, -2)[..., : out.shape[-2], :]
    if wide < out.shape[-1]:
        full = full.repeat_interleave(wide, -1)[..., : out.shape[-1]]
    if out.dtype == torch.float32:
        return out.copy_(packed).mul_(full)
    return out.copy_(packed.float().mul_(full))


def dequantise_8bit(
    packed: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None, again: bool = False
) -> Tensor:
    """The weight as numbers.

    Args:
        packed: (..., rows, columns) int8 or float8_e4m3fn.
        scale: fp32 (..., rows, 1), (..., ⌈rows/128⌉, ⌈columns/128⌉) or a single one.
        shape, dtype: Of the result. out: Where to write it; contiguous. again: Set in a backward pass, see `dequantise_4bit`.
    """
    if not real(packed):
        made = _op(packed, scale, list(shape), dtype, again)
        return made if out is None else out.copy_(made)
    out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    if usable(packed):
        return kernels().dequantise_8bit_triton(packed, scale, out, *tiles(shape, scale))
    return dequantise_8bit_reference(packed.view(shape), scale, out)


@torch.library.custom_op("weft::dequantise_8bit", mutates_args=())
def _op(packed: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype, again: bool) -> Tensor:
    return dequantise_8bit(packed, scale, tuple(shape), dtype)


@_op.register_fake
def _(packed, scale, shape, dtype, again):  # type: ignore[no-untyped-def]
    return packed.new_empty(shape, dtype=dtype)
