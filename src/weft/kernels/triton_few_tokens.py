"""The Triton kernels behind `weft.kernels.few_tokens`: x Wᵀ from the bytes of W, each read once.

Both walk along the summed axis and hold a tile of W in registers. A tile is seen in groups of 32 weights: of any block size from 32 and of
any tile of 128, a group has a single scale, since rows are a multiple of 32 long, even where a block straddles two rows. W is loaded
before x: Triton lays a tile out for what is loaded last, and laid out for W, each thread would hold as many numbers of x (202 registers
instead of 40 for `_one`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from weft.kernels import few_tokens as plain
from weft.kernels.launch import on_its_card
from weft.kernels.triton import scale_of

GROUP = tl.constexpr(plain.GROUP)
MMA_ROWS = 16  # what a tensor core multiplies at least; missing tokens are zeros


@triton.jit
def _scales(scale, code2, scale2, offset, row, k, there, inputs, shift, high, wide, across, FOUR: tl.constexpr, NESTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of each group, 0 where there is none. row (ROWS, 1) int64, k (1, GROUPS)."""
    if FOUR:
        found = scale_of(scale, code2, scale2, offset, (row * inputs + k) >> shift, there, NESTED)
    else:
        found = tl.load(scale + (row // high) * across + k // wide, mask=there, other=0.0)
    return tl.where(there, found, 0.0)


@triton.jit
def _values(q, lut, row, start, outputs, stride, FOUR: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(ROWS, GROUPS, 32) fp32: the weights from `start` on, without their scales. stride: bytes a row."""
    SIZE: tl.constexpr = GROUPS * GROUP // 2 if FOUR else GROUPS * GROUP
    j = (start // 2 if FOUR else start) + tl.arange(0, SIZE)
    byte = tl.load(q + row * stride + j[None, :], mask=(row < outputs) & (j < stride)[None, :], other=0.0)
    if FOUR:
        code = tl.join(byte.to(tl.int32) >> 4, byte.to(tl.int32) & 15)
        return tl.gather(lut, code.reshape(ROWS * GROUPS * GROUP), 0).reshape(ROWS, GROUPS, GROUP)  # from shared memory
    else:
        return byte.to(tl.float32).reshape(ROWS, GROUPS, GROUP)


@triton.jit
def _one(  # type: ignore[no-untyped-def]
    x, q, scale, code2, scale2, offset, table, y, tokens, outputs, stride, shift, high, wide, across,
    inputs: tl.constexpr, FOUR: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) % tokens).to(tl.int64)  # neighbours share the rows
    row = ((tl.program_id(0) // tokens).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lut = tl.load(table + tl.arange(0, 16))
    acc = tl.zeros((ROWS, GROUPS), tl.float32)
    for start in range(0, inputs, GROUPS * GROUP):
        w = _values(q, lut, row, start, outputs, stride, FOUR, ROWS, GROUPS)
        i = start + tl.arange(0, GROUPS * GROUP)
        v = tl.load(x + token * inputs + i, mask=i < inputs, other=0.0).to(tl.float32)
        k = (start + tl.arange(0, GROUPS) * GROUP)[None, :]
        there = (row < outputs) & (k < inputs)
        s = _scales(scale, code2, scale2, offset, row, k, there, inputs, shift, high, wide, across, FOUR, NESTED)
        acc += tl.sum(w * v.reshape(1, GROUPS, GROUP), 2) * s
    out = tl.sum(acc, 1, keep_dims=True).to(y.dtype.element_ty)
    tl.store(y + token * outputs + row, out, mask=row < outputs)


@triton.jit
def _few(  # type: ignore[no-untyped-def]
    x, q, scale, code2, scale2, offset, table, y, tokens, outputs, stride, shift, high, wide, across,
    inputs: tl.constexpr, FOUR: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = GROUPS * GROUP
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS))[:, None]
    lut = tl.load(table + tl.arange(0, 16))
    acc = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)  # each warp sums a part of its own, along a part of the axis
    for start in tl.range(0, inputs, SIZE, num_stages=STAGES):
        w = _values(q, lut, row, start, outputs, stride, FOUR, ROWS, GROUPS)
        i = (start + tl.arange(0, SIZE))[None, :]
        v = tl.load(x + token * inputs + i, mask=(token < tokens) & (i < inputs), other=0.0)
        k = (start + tl.arange(0, GROUPS) * GROUP)[None, :]
        there = (row < outputs) & (k < inputs)
        s = _scales(scale, code2, scale2, offset, row, k, there, inputs, shift, high, wide, across, FOUR, NESTED)
        w = (w * s[:, :, None]).to(x.dtype.element_ty).reshape(ROWS, PARTS, SIZE // PARTS)
        acc = tl.dot(w.permute(1, 0, 2), v.reshape(TOKENS, PARTS, SIZE // PARTS).permute(1, 2, 0), acc)
    out = tl.trans(tl.sum(acc, 0)).to(y.dtype.element_ty)
    tl.store(y + token * outputs + row.reshape(1, ROWS), out, mask=(token < tokens) & (row < outputs).reshape(1, ROWS))


@on_its_card
def one_token(
    x: Tensor, args: tuple[Any, ...], y: Tensor, meta: dict[str, Any], rows: int = 2, groups: int = 32, warps: int = 1
) -> Tensor:
    """y (tokens, outputs) for x (tokens, inputs), each token by itself, in fp32 throughout.

    `rows` outputs a program, 32 · `groups` inputs at once; powers of two, as `warps`. args, meta: From `operands_4bit` or `operands_8bit`.
    """
    inputs, outputs = x.shape[1], y.shape[1]
    grid: Any = (x.shape[0] * -(-outputs // rows),)
    size = {"ROWS": rows, "GROUPS": groups, "num_warps": warps}
    _one[grid](x, *args[:6], y, x.shape[0], outputs, *args[6:], inputs=inputs, **meta, **size)
    return y


@on_its_card
def few_tokens(
    x: Tensor, args: tuple[Any, ...], y: Tensor, meta: dict[str, Any], rows: int = 16, groups: int = 8, warps: int = 4, stages: int = 4
) -> Tensor:
    """The same, sixteen tokens at a time on tensor cores; a weight is rounded to x's dtype, as decoding does. 2 · `groups` ≥ `warps`."""
    inputs, outputs = x.shape[1], y.shape[1]
    grid: Any = (-(-outputs // rows), -(-x.shape[0] // MMA_ROWS))
    size = {"ROWS": rows, "GROUPS": groups, "PARTS": warps, "TOKENS": MMA_ROWS, "STAGES": stages, "num_warps": warps}
    _few[grid](x, *args[:6], y, x.shape[0], outputs, *args[6:], inputs=inputs, **meta, **size)
    return y
