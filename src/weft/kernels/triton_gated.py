"""The Triton kernels of `weft.kernels.gated`, imported when they are needed.

The ranks' axis is padded to what a matrix unit takes (16 at least). What is summed over tokens is summed by SPLITS programs a block of
columns, each over its own tokens and in order, and then over those: no atomics, so a run can be repeated bit for bit. S = h Aᵀ is summed
over columns so, by a few programs a block of rows. What has a row for each token may be columns of a wider tensor (last stride 1), each
with its own distance from row to row, `*_row`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.hadamard import power_of_two
from weft.kernels.launch import on_its_card

SPLITS = 8
# Loads of 16-bit tensors that are on their way while one block is worked on, through shared memory; in fp32 that would take all there is.
STAGES = {torch.bfloat16: 3, torch.float16: 3}
# Up to which rank the forward kernel sums S itself, in which blocks, and of how many programs: what an H100 holds at once, since all take
# equally long. `bench/gated.py --forward` tries them. They want the shared memory of such a card.
SUMMED = {16: dict(rows=64, columns=128, stages=3, programs=128), 64: dict(rows=128, columns=64, stages=3, programs=128)}
SHARED = 227 << 10


@triton.jit
def _rows_of(S, rows, n, r, row, R: tl.constexpr):  # type: ignore[no-untyped-def]
    k = tl.arange(0, R)
    return tl.load(S + rows[:, None] * row + k[None, :], mask=(rows < n)[:, None] & (k < r)[None, :], other=0.0)


@triton.jit
def _within_sigmoid(x, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    if GELU:
        return 1.5957691216057308 * (x + 0.044715 * x * x * x), 1.5957691216057308 * (1 + 0.134145 * x * x)  # √(8/π)
    else:
        return x, 1.0


@triton.jit
def _sigmoid(p):  # type: ignore[no-untyped-def]
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * p))  # two special functions and no division, whose edge cases cost more than these
    return root * root


@triton.jit
def _slopes(d, gate, up, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """What comes back to gate and up, and h."""
    p, slope = _within_sigmoid(gate, GELU)
    sig = _sigmoid(p)
    act = gate * sig
    return d * up * (sig + act * (1 - sig) * slope), d * act, act * up


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    g, u, Sg, Bg, Su, Bu, cg, cu, h, n, width, rg, ru, each, g_row, u_row, sg_row, su_row, RG: tl.constexpr, RU: tl.constexpr,
    CG: tl.constexpr, CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here, across = columns < width, columns[None, :]
    bg, bu = tl.trans(_rows_of(Bg, columns, width, rg, rg, RG)), tl.trans(_rows_of(Bu, columns, width, ru, ru, RU))
    if CG:
        scale_g = tl.load(cg + columns, mask=here, other=0.0)[None, :]
    if CU:
        scale_u = tl.load(cu + columns, mask=here, other=0.0)[None, :]
    for start in tl.range(0, each, ROWS, num_stages=STAGES):
        rows = tl.program_id(1).to(tl.int64) * each + start + tl.arange(0, ROWS)
        down = rows[:, None]
        inside = (down < n) & here[None, :]
        gate = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        up = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        sg, su = _rows_of(Sg, rows, n, rg, sg_row, RG), _rows_of(Su, rows, n, ru, su_row, RU)
        gate = gate.to(tl.float32) + tl.dot(sg, bg, input_precision=PRECISION)
        up = up.to(tl.float32) + tl.dot(su, bu, input_precision=PRECISION)
        if CG:
            gate *= scale_g
        if CU:
            up *= scale_u
        p, _ = _within_sigmoid(gate, GELU)
        tl.store(h + (down * width + across), (gate * _sigmoid(p) * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _gated_and_s(  # type: ignore[no-untyped-def]
    g, u, Sg, Bg, Su, Bu, A, cg, cu, h, S, n, width, rg, ru, rd, each, g_row, u_row, sg_row, su_row, RG: tl.constexpr, RU: tl.constexpr,
    RD: tl.constexpr, CG: tl.constexpr, CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RD)
    down, below = row[:, None], (first + row < n)[:, None]
    sg, su = _rows_of(Sg, first + row, n, rg, sg_row, RG), _rows_of(Su, first + row, n, ru, su_row, RU)
    g, u, h = g + first * g_row, u + first * u_row, h + first * width  # offsets within a block fit into 32 bits
    s = tl.zeros((ROWS, RD), tl.float32)
    for start in tl.range(0, each, COLUMNS, num_stages=STAGES):
        columns = tl.program_id(1) * each + start + column
        here, across = columns < width, columns[None, :]
        inside = below & here[None, :]
        gate = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        up = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        bg, bu = tl.trans(_rows_of(Bg, columns, width, rg, rg, RG)), tl.trans(_rows_of(Bu, columns, width, ru, ru, RU))
        a = tl.load(A + (k[:, None] * width + across), mask=(k < rd)[:, None] & here[None, :], other=0.0)
        gate = gate.to(tl.float32) + tl.dot(sg, bg, input_precision=PRECISION)
        up = up.to(tl.float32) + tl.dot(su, bu, input_precision=PRECISION)
        if CG:
            gate *= tl.load(cg + columns, mask=here, other=0.0)[None, :]
        if CU:
            up *= tl.load(cu + columns, mask=here, other=0.0)[None, :]
        p, _ = _within_sigmoid(gate, GELU)
        out = (gate * _sigmoid(p) * up).to(h.dtype.element_ty)
        tl.store(h + (down * width + across), out, mask=inside)
        s += tl.dot(out, tl.trans(a), input_precision=PRECISION)
    place = S + (tl.program_id(1).to(tl.int64) * n + first) * rd + (down * rd + k[None, :])
    tl.store(place, s, mask=below & (k < rd)[None, :])


@triton.jit
def _gated_backward(  # type: ignore[no-untyped-def]
    dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, dBg, dBu, dA, dcg, dcu, n, width, rg, ru, rd, each,
    dh_row, ds_row, g_row, u_row, sg_row, su_row, dg_row, du_row, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < width
    bg, bu = tl.trans(_rows_of(Bg, columns, width, rg, rg, RG)), tl.trans(_rows_of(Bu, columns, width, ru, ru, RU))
    k = tl.arange(0, RD)
    a = tl.load(A + k[:, None] * width + columns[None, :], mask=(k < rd)[:, None] & here[None, :], other=0.0)
    sum_g = tl.zeros((COLUMNS, RG), tl.float32)
    sum_u = tl.zeros((COLUMNS, RU), tl.float32)
    sum_a = tl.zeros((COLUMNS, RD), tl.float32)
    if CG:
        scale_g = tl.load(cg + columns, mask=here, other=0.0)[None, :]
        sum_cg = tl.zeros((COLUMNS,), tl.float32)
    if CU:
        scale_u = tl.load(cu + columns, mask=here, other=0.0)[None, :]
        sum_cu = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, each, ROWS, num_stages=STAGES):
        rows = split * each + start + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & here[None, :]
        down, across = rows[:, None], columns[None, :]
        within = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        beside = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        d = tl.load(dh + (down * dh_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        sg, su, ds = _rows_of(Sg, rows, n, rg, sg_row, RG), _rows_of(Su, rows, n, ru, su_row, RU), _rows_of(dS, rows, n, rd, ds_row, RD)
        within = within.to(tl.float32) + tl.dot(sg, bg, input_precision=PRECISION)
        beside = beside.to(tl.float32) + tl.dot(su, bu, input_precision=PRECISION)
        d = d.to(tl.float32) + tl.dot(ds, a, input_precision=PRECISION)
        gate = within * scale_g if CG else within
        up = beside * scale_u if CU else beside
        dgate, dup, h = _slopes(d, gate, up, GELU)
        if CG:
            sum_cg += tl.sum(dgate * within, 0)
            dgate *= scale_g
        if CU:
            sum_cu += tl.sum(dup * beside, 0)
            dup *= scale_u
        dgate = dgate.to(dg.dtype.element_ty)
        dup = dup.to(dg.dtype.element_ty)
        tl.store(dg + (down * dg_row + across), dgate, mask=inside)
        tl.store(du + (down * du_row + across), dup, mask=inside)
        sum_g += tl.dot(tl.trans(dgate), sg, input_precision=PRECISION)
        sum_u += tl.dot(tl.trans(dup), su, input_precision=PRECISION)
        sum_a += tl.dot(tl.trans(h.to(dg.dtype.element_ty)), ds, input_precision=PRECISION)
    row = (split * width + columns)[:, None]
    kg, ku = tl.arange(0, RG), tl.arange(0, RU)
    tl.store(dBg + row * rg + kg[None, :], sum_g, mask=here[:, None] & (kg < rg)[None, :])
    tl.store(dBu + row * ru + ku[None, :], sum_u, mask=here[:, None] & (ku < ru)[None, :])
    tl.store(dA + row * rd + k[None, :], sum_a, mask=here[:, None] & (k < rd)[None, :])
    if CG:
        tl.store(dcg + split * width + columns, sum_cg, mask=here)
    if CU:
        tl.store(dcu + split * width + columns, sum_cu, mask=here)


def _padded(rank: int) -> int:
    return max(16, power_of_two(rank))


def _exact(t: Tensor) -> str:
    return "ieee" if t.dtype == torch.float32 else "tf32"  # the latter has no say on 16-bit factors


@on_its_card
def gated_by_columns(
    g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None, cu: Tensor | None = None,
    gelu: bool = False, rows: int = 32, columns: int = 128, warps: int = 8, splits: int = 8 * SPLITS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A program goes down its columns, whose factors stay in registers; S is a product of its own, which reads h once more."""
    n, width = g.shape
    h = g.new_empty(n, width)
    each = -(-n // (splits * rows)) * rows
    grid: Any = (-(-width // columns), splits)
    _gated[grid](
        g, u, Sg, Bg, Su, Bu, cg, cu, h, n, width, Sg.shape[1], Su.shape[1], each, *(t.stride(0) for t in (g, u, Sg, Su)),
        RG=_padded(Sg.shape[1]), RU=_padded(Su.shape[1]), CG=cg is not None, CU=cu is not None, GELU=gelu, ROWS=rows, COLUMNS=columns,
        STAGES=STAGES.get(g.dtype, 1), PRECISION=_exact(g), num_warps=warps,
    )  # fmt: skip
    return h, h @ A.T


@on_its_card
def gated_by_rows(
    g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None, cu: Tensor | None = None,
    gelu: bool = False, rows: int = 64, columns: int = 128, stages: int = 3, splits: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A program goes along its rows, loads the factors from the second-level cache once a block, and sums S while it has h.

    A warp takes 16 rows, so that h is where the product with A wants it: of twice as many each pair would do the same rows.
    """
    n, width = g.shape
    h, ranks = g.new_empty(n, width), (Sg.shape[1], Su.shape[1], A.shape[0])
    S = g.new_empty(splits, n, ranks[2], dtype=torch.float32)
    each = -(-width // (splits * columns)) * columns
    grid: Any = (-(-n // rows), splits)
    _gated_and_s[grid](
        g, u, Sg, Bg, Su, Bu, A, cg, cu, h, S, n, width, *ranks, each, *(t.stride(0) for t in (g, u, Sg, Su)),
        RG=_padded(ranks[0]), RU=_padded(ranks[1]), RD=_padded(ranks[2]), CG=cg is not None, CU=cu is not None, GELU=gelu, ROWS=rows,
        COLUMNS=columns, STAGES=stages, PRECISION=_exact(g), num_warps=rows // 16,
    )  # fmt: skip
    return h, S.sum(0).to(g.dtype)


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    return SHARED if device.type == "cpu" else getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def gated_triton(
    g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None, cu: Tensor | None = None,
    gelu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `gated_reference`. g, u, Sg and Su may be columns of wider tensors."""
    (n, width), rank = g.shape, max(Sg.shape[1], Su.shape[1], A.shape[0])
    how = next((how for most, how in SUMMED.items() if rank <= most and g.itemsize == 2), None)
    if how is None or _shared(g.device) < SHARED:
        return gated_by_columns(g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu)
    rows, columns, stages, programs = (how[name] for name in ("rows", "columns", "stages", "programs"))
    splits = max(1, min(programs // -(-n // rows), -(-width // columns)))
    return gated_by_rows(g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu, rows, columns, stages, splits)


@on_its_card
def gated_backward_triton(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None,
    cu: Tensor | None = None, gelu: bool = False, dg: Tensor | None = None, du: Tensor | None = None, rows: int = 32,
    columns: int | None = None, warps: int | None = None, splits: int = SPLITS,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `gated_backward_reference`, in one launch and small sums. dh, dS, g, u, Sg, Su, dg and du may be columns of wider tensors."""
    n, width = g.shape
    if columns is None or warps is None:  # what fits into the registers
        columns, warps = (128, 8) if g.itemsize == 2 and max(Sg.shape[1], Su.shape[1], dS.shape[1]) <= 32 else (64, 4)
    dg, du = (g.new_empty(n, width) if d is None else d for d in (dg, du))
    ranks = Sg.shape[1], Su.shape[1], dS.shape[1]
    parts = [g.new_empty(splits, width, r, dtype=torch.float32) for r in ranks]
    scales = [g.new_empty(splits, 0 if c is None else width, dtype=torch.float32) for c in (cg, cu)]
    each = -(-n // (splits * rows)) * rows
    grid: Any = (-(-width // columns), splits)
    _gated_backward[grid](
        dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, *parts, *scales, n, width, *ranks, each,
        *(t.stride(0) for t in (dh, dS, g, u, Sg, Su, dg, du)), RG=_padded(ranks[0]), RU=_padded(ranks[1]), RD=_padded(ranks[2]),
        CG=cg is not None, CU=cu is not None, GELU=gelu, ROWS=rows, COLUMNS=columns, STAGES=STAGES.get(g.dtype, 1),
        PRECISION=_exact(g), num_warps=warps,
    )  # fmt: skip
    dBg, dBu, dA, dcg, dcu = (part.sum(0) for part in (*parts, *scales))
    return dg, du, dBg.to(Bg.dtype), dBu.to(Bu.dtype), dA.T.to(A.dtype).contiguous(), dcg, dcu
