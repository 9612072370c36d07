"""The Triton kernels that decode a weight, or turn it round, in one launch, where Triton is installed: on a card, or on a CPU under
TRITON_INTERPRET=1. `weft.kernels.launch` imports this when it is needed: Triton takes 0.15 seconds.

Fusing of multiply and add is off (enable_fp_fusion=False): a fused map · absmax + offset moves 6% of the scales by an ulp.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.launch import on_its_card


@triton.jit
def scale_of(absmax, code2, absmax2, offset, block, there, NESTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scales of these blocks, in fp32; something finite where none is there."""
    if NESTED:
        code = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        return tl.load(code2 + code) * tl.load(absmax2 + (block >> 8), mask=there, other=0.0) + tl.load(offset)
    else:
        return tl.load(absmax + block, mask=there, other=0.0)


@triton.jit
def _four(  # type: ignore[no-untyped-def]
    q, absmax, code2, absmax2, offset, lut, out, nbytes, numel, blocks, HALF: tl.constexpr, NESTED: tl.constexpr, MANY: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)  # MANY blocks of HALF bytes each
    there = block < blocks
    scale = scale_of(absmax, code2, absmax2, offset, block, there, NESTED)
    i = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(q + i, mask=i < nbytes, other=0).to(tl.int32)
    high = tl.load(lut + (byte >> 4)) * scale[:, None]
    low = tl.load(lut + (byte & 15)) * scale[:, None]
    both = tl.join(high, low).reshape(MANY, 2 * HALF).to(out.dtype.element_ty)
    j = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + j, both, mask=j < numel)


@triton.jit
def _eight(q, scale, out, rows, columns, high, wide, across, per, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)  # over all leading dimensions
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < columns
    first = (row // rows) * per + ((row % rows) // high) * across
    s = tl.load(scale + first + column // wide, mask=inside, other=0.0)
    value = tl.load(q + row * columns + column, mask=inside, other=0.0).to(tl.float32) * s
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turned(q, out, rows, columns, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    r = (tl.program_id(0) * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    c = (tl.program_id(1) * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    tile = tl.load(q + r[:, None] * columns + c[None, :], mask=(r[:, None] < rows) & (c[None, :] < columns), other=0)
    tl.store(out + c[:, None] * rows + r[None, :], tl.trans(tile), mask=(c[:, None] < columns) & (r[None, :] < rows))


@on_its_card
def dequantise_4bit_triton(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, lut: Tensor, code2: Tensor, out: Tensor,
    block: int, size: int = 1024, warps: int = 2,
) -> Tensor:  # fmt: skip
    """As `dequantise_4bit_reference`, in one launch. `size`: bytes that one program decodes, a power of two."""
    nested = nested_absmax is not None and nested_offset is not None
    second, offset = (nested_absmax, nested_offset) if nested else (absmax, absmax)
    nbytes, many = (out.numel() + 1) // 2, max(1, 2 * size // block)
    grid: Any = (-(-absmax.numel() // many),)
    _four[grid](
        packed, absmax, code2, second, offset, lut, out, nbytes, out.numel(), absmax.numel(), HALF=block // 2, NESTED=nested, MANY=many,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@on_its_card
def dequantise_8bit_triton(packed: Tensor, scale: Tensor, out: Tensor, high: int, wide: int, size: int = 1024, warps: int = 2) -> Tensor:
    """As `dequantise_8bit_reference`, in one launch."""
    rows, columns = out.shape[-2:]
    across = 1 if scale.numel() == 1 else scale.shape[-1]
    per = 0 if scale.numel() == 1 else scale.shape[-2] * across
    grid: Any = (out.numel() // columns, -(-columns // size))
    _eight[grid](packed, scale, out, rows, columns, high, wide, across, per, SIZE=size, num_warps=warps, enable_fp_fusion=False)
    return out


@on_its_card
def transpose_bytes_triton(packed: Tensor, out: Tensor, size: int = 128, warps: int = 8) -> Tensor:
    """packed (rows, columns), one byte an element, into out (columns, rows), tile by tile."""
    rows, columns = packed.shape
    grid: Any = (-(-rows // size), -(-columns // size))
    _turned[grid](packed.view(torch.uint8), out.view(torch.uint8), rows, columns, SIZE=size, num_warps=warps)
    return out
