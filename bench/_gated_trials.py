"""Scratch: variants of the kernels of gated MLPs to choose among on a card (`bench/gated.py --tune`). Deleted once chosen."""
# ruff: noqa
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.triton_gated import _exact, _padded, _rows_of, _within_sigmoid

@triton.jit
def _sig(p, FAST: tl.constexpr):
    if FAST:
        root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * p))
        return root * root
    else:
        return tl.sigmoid(p)

@triton.jit
def fwd_first(
    g, u, Sg, Bg, Su, Bu, cg, cu, h, n, width, rg, ru, g_row, u_row, sg_row, su_row, each, RG: tl.constexpr, RU: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, EVICT: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    down, across = rows[:, None], columns[None, :]
    inside = (down < n) & (across < width)
    gate = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
    up = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
    bg, bu = _rows_of(Bg, columns, width, rg, rg, RG), _rows_of(Bu, columns, width, ru, ru, RU)
    sg, su = _rows_of(Sg, rows, n, rg, sg_row, RG), _rows_of(Su, rows, n, ru, su_row, RU)
    if CG:
        scale_g = tl.load(cg + columns, mask=columns < width, other=0.0)[None, :]
    if CU:
        scale_u = tl.load(cu + columns, mask=columns < width, other=0.0)[None, :]
    gate = gate.to(tl.float32) + tl.dot(sg, tl.trans(bg), input_precision=PRECISION)
    up = up.to(tl.float32) + tl.dot(su, tl.trans(bu), input_precision=PRECISION)
    if CG:
        gate *= scale_g
    if CU:
        up *= scale_u
    p, _ = _within_sigmoid(gate, GELU)
    tl.store(h + (down * width + across), (gate * _sig(p, FAST) * up).to(h.dtype.element_ty), mask=inside)

@triton.jit
def fwd_loop(
    g, u, Sg, Bg, Su, Bu, cg, cu, h, n, width, rg, ru, g_row, u_row, sg_row, su_row, each, RG: tl.constexpr, RU: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, EVICT: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    across = columns[None, :]
    bg, bu = tl.trans(_rows_of(Bg, columns, width, rg, rg, RG)), tl.trans(_rows_of(Bu, columns, width, ru, ru, RU))
    if CG:
        scale_g = tl.load(cg + columns, mask=columns < width, other=0.0)[None, :]
    if CU:
        scale_u = tl.load(cu + columns, mask=columns < width, other=0.0)[None, :]
    first = tl.program_id(1).to(tl.int64) * each
    for start in tl.range(0, each, ROWS, num_stages=STAGES):
        rows = first + start + tl.arange(0, ROWS)
        down = rows[:, None]
        inside = (down < n) & (across < width)
        gate = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        up = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        sg, su = _rows_of(Sg, rows, n, rg, sg_row, RG), _rows_of(Su, rows, n, ru, su_row, RU)
        gate = gate.to(tl.float32) + tl.dot(sg, bg, input_precision=PRECISION)
        up = up.to(tl.float32) + tl.dot(su, bu, input_precision=PRECISION)
        if CG:
            gate *= scale_g
        if CU:
            up *= scale_u
        p, _ = _within_sigmoid(gate, GELU)
        tl.store(h + (down * width + across), (gate * _sig(p, FAST) * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def bwd_rows(
    dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, dBg, dBu, dA, dcg, dcu, n, width, rg, ru, rd, each,
    dh_row, ds_row, g_row, u_row, sg_row, su_row, dg_row, du_row, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, EVICT: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < width
    across = columns[None, :]
    bg, bu = tl.trans(_rows_of(Bg, columns, width, rg, rg, RG)), tl.trans(_rows_of(Bu, columns, width, ru, ru, RU))
    k = tl.arange(0, RD)
    a = tl.load(A + k[:, None] * width + across, mask=(k < rd)[:, None] & here[None, :], other=0.0)
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
        down = rows[:, None]
        inside = (down < n) & here[None, :]
        within = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        beside = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        d = tl.load(dh + (down * dh_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        sg, su, ds = _rows_of(Sg, rows, n, rg, sg_row, RG), _rows_of(Su, rows, n, ru, su_row, RU), _rows_of(dS, rows, n, rd, ds_row, RD)
        within = within.to(tl.float32) + tl.dot(sg, bg, input_precision=PRECISION)
        beside = beside.to(tl.float32) + tl.dot(su, bu, input_precision=PRECISION)
        d = d.to(tl.float32) + tl.dot(ds, a, input_precision=PRECISION)
        gate = within * scale_g if CG else within
        up = beside * scale_u if CU else beside
        p, slope = _within_sigmoid(gate, GELU)
        sig = _sig(p, FAST)
        act = gate * sig
        dgate = d * up * (sig + act * (1 - sig) * slope)
        dup = d * act
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
        sum_a += tl.dot(tl.trans((act * up).to(dg.dtype.element_ty)), ds, input_precision=PRECISION)
    row = (split * width + columns)[:, None]
    kg, ku = tl.arange(0, RG), tl.arange(0, RU)
    tl.store(dBg + row * rg + kg[None, :], sum_g, mask=here[:, None] & (kg < rg)[None, :])
    tl.store(dBu + row * ru + ku[None, :], sum_u, mask=here[:, None] & (ku < ru)[None, :])
    tl.store(dA + row * rd + k[None, :], sum_a, mask=here[:, None] & (k < rd)[None, :])
    if CG:
        tl.store(dcg + split * width + columns, sum_cg, mask=here)
    if CU:
        tl.store(dcu + split * width + columns, sum_cu, mask=here)


@triton.jit
def bwd_rows_t(
    dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, dBg, dBu, dA, dcg, dcu, n, width, rg, ru, rd, each,
    dh_row, ds_row, g_row, u_row, sg_row, su_row, dg_row, du_row, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, EVICT: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < width
    across = columns[None, :]
    bg, bu = tl.trans(_rows_of(Bg, columns, width, rg, rg, RG)), tl.trans(_rows_of(Bu, columns, width, ru, ru, RU))
    k = tl.arange(0, RD)
    a = tl.load(A + k[:, None] * width + across, mask=(k < rd)[:, None] & here[None, :], other=0.0)
    sum_g = tl.zeros((RG, COLUMNS), tl.float32)
    sum_u = tl.zeros((RU, COLUMNS), tl.float32)
    sum_a = tl.zeros((RD, COLUMNS), tl.float32)
    if CG:
        scale_g = tl.load(cg + columns, mask=here, other=0.0)[None, :]
        sum_cg = tl.zeros((COLUMNS,), tl.float32)
    if CU:
        scale_u = tl.load(cu + columns, mask=here, other=0.0)[None, :]
        sum_cu = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, each, ROWS, num_stages=STAGES):
        rows = split * each + start + tl.arange(0, ROWS)
        down = rows[:, None]
        inside = (down < n) & here[None, :]
        within = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        beside = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        d = tl.load(dh + (down * dh_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        sg, su, ds = _rows_of(Sg, rows, n, rg, sg_row, RG), _rows_of(Su, rows, n, ru, su_row, RU), _rows_of(dS, rows, n, rd, ds_row, RD)
        within = within.to(tl.float32) + tl.dot(sg, bg, input_precision=PRECISION)
        beside = beside.to(tl.float32) + tl.dot(su, bu, input_precision=PRECISION)
        d = d.to(tl.float32) + tl.dot(ds, a, input_precision=PRECISION)
        gate = within * scale_g if CG else within
        up = beside * scale_u if CU else beside
        p, slope = _within_sigmoid(gate, GELU)
        sig = _sig(p, FAST)
        act = gate * sig
        dgate = d * up * (sig + act * (1 - sig) * slope)
        dup = d * act
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
        sum_g += tl.dot(tl.trans(sg), dgate, input_precision=PRECISION)
        sum_u += tl.dot(tl.trans(su), dup, input_precision=PRECISION)
        sum_a += tl.dot(tl.trans(ds), (act * up).to(dg.dtype.element_ty), input_precision=PRECISION)
    row = (split * width + columns)[:, None]
    kg, ku = tl.arange(0, RG), tl.arange(0, RU)
    tl.store(dBg + row * rg + kg[None, :], tl.trans(sum_g), mask=here[:, None] & (kg < rg)[None, :])
    tl.store(dBu + row * ru + ku[None, :], tl.trans(sum_u), mask=here[:, None] & (ku < ru)[None, :])
    tl.store(dA + row * rd + k[None, :], tl.trans(sum_a), mask=here[:, None] & (k < rd)[None, :])
    if CG:
        tl.store(dcg + split * width + columns, sum_cg, mask=here)
    if CU:
        tl.store(dcu + split * width + columns, sum_cu, mask=here)


@triton.jit
def bwd_sums(
    dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, dBg, dBu, dA, dcg, dcu, dSg, dSu, n, width, rg, ru, rd, each,
    dh_row, ds_row, g_row, u_row, sg_row, su_row, dg_row, du_row, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, EVICT: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < width
    across = columns[None, :]
    bg, bu = tl.trans(_rows_of(Bg, columns, width, rg, rg, RG)), tl.trans(_rows_of(Bu, columns, width, ru, ru, RU))
    k = tl.arange(0, RD)
    a = tl.load(A + k[:, None] * width + across, mask=(k < rd)[:, None] & here[None, :], other=0.0)
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
        down = rows[:, None]
        inside = (down < n) & here[None, :]
        within = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        beside = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        d = tl.load(dh + (down * dh_row + across), mask=inside, other=0.0, eviction_policy=EVICT)
        sg, su, ds = _rows_of(Sg, rows, n, rg, sg_row, RG), _rows_of(Su, rows, n, ru, su_row, RU), _rows_of(dS, rows, n, rd, ds_row, RD)
        within = within.to(tl.float32) + tl.dot(sg, bg, input_precision=PRECISION)
        beside = beside.to(tl.float32) + tl.dot(su, bu, input_precision=PRECISION)
        d = d.to(tl.float32) + tl.dot(ds, a, input_precision=PRECISION)
        gate = within * scale_g if CG else within
        up = beside * scale_u if CU else beside
        p, slope = _within_sigmoid(gate, GELU)
        sig = _sig(p, FAST)
        act = gate * sig
        dgate = d * up * (sig + act * (1 - sig) * slope)
        dup = d * act
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
        part = (tl.program_id(0).to(tl.int64) * n + rows)[:, None]
        kg, ku = tl.arange(0, RG), tl.arange(0, RU)
        tl.store(dSg + part * rg + kg[None, :], tl.dot(dgate, tl.trans(bg), input_precision=PRECISION), mask=(rows < n)[:, None] & (kg < rg)[None, :])
        tl.store(dSu + part * ru + ku[None, :], tl.dot(dup, tl.trans(bu), input_precision=PRECISION), mask=(rows < n)[:, None] & (ku < ru)[None, :])
        sum_g += tl.dot(tl.trans(dgate), sg, input_precision=PRECISION)
        sum_u += tl.dot(tl.trans(dup), su, input_precision=PRECISION)
        sum_a += tl.dot(tl.trans((act * up).to(dg.dtype.element_ty)), ds, input_precision=PRECISION)
    row = (split * width + columns)[:, None]
    kg, ku = tl.arange(0, RG), tl.arange(0, RU)
    tl.store(dBg + row * rg + kg[None, :], sum_g, mask=here[:, None] & (kg < rg)[None, :])
    tl.store(dBu + row * ru + ku[None, :], sum_u, mask=here[:, None] & (ku < ru)[None, :])
    tl.store(dA + row * rd + k[None, :], sum_a, mask=here[:, None] & (k < rd)[None, :])
    if CG:
        tl.store(dcg + split * width + columns, sum_cg, mask=here)
    if CU:
        tl.store(dcu + split * width + columns, sum_cu, mask=here)


KERNELS = {k.__name__: k for k in (fwd_first, fwd_loop, bwd_rows, bwd_rows_t, bwd_sums)}


def _launch(kernel: Any, args: tuple, grid: Any, how: dict, warm: bool) -> None:
    if warm:
        kernel.warmup(*args, grid=grid, **how)
    else:
        kernel[grid](*args, **how)


def forward(name: str, how: dict[str, Any], given: tuple, warm: bool = False) -> Tensor:
    """`how`: ROWS, COLUMNS, num_warps, STAGES, splits, ..."""
    g, u, Sg, Bg, Su, Bu, cg, cu, gelu = given
    n, width = g.shape
    how = dict(how)
    splits = how.pop("splits", 1)
    h = g.new_empty(n, width)
    each = -(-n // (splits * how["ROWS"])) * how["ROWS"]
    grid = (-(-width // how["COLUMNS"]), -(-n // how["ROWS"]) if name == "fwd_first" else splits)
    ranks = Sg.shape[1], Su.shape[1]
    args = (g, u, Sg, Bg, Su, Bu, cg, cu, h, n, width, *ranks, *(t.stride(0) for t in (g, u, Sg, Su)), each)
    more = dict(RG=_padded(ranks[0]), RU=_padded(ranks[1]), CG=cg is not None, CU=cu is not None, GELU=gelu, PRECISION=_exact(g))
    _launch(KERNELS[name], args, grid, how | more, warm)
    return h


def backward(name: str, how: dict[str, Any], given: tuple, warm: bool = False) -> tuple[Tensor, ...]:
    dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu = given
    n, width = g.shape
    how = dict(how)
    splits = how.pop("splits")
    dg, du = g.new_empty(n, width), g.new_empty(n, width)
    ranks = Sg.shape[1], Su.shape[1], dS.shape[1]
    parts = [g.new_empty(splits, width, r, dtype=torch.float32) for r in ranks]
    scales = [g.new_empty(splits, 0 if c is None else width, dtype=torch.float32) for c in (cg, cu)]
    each = -(-n // (splits * how["ROWS"])) * how["ROWS"]
    grid = (-(-width // how["COLUMNS"]), splits)
    sums = [g.new_empty(grid[0], n, r, dtype=torch.float32) for r in ranks[:2]] if name == "bwd_sums" else []
    args = (dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, *parts, *scales, *sums, n, width, *ranks, each)
    args += tuple(t.stride(0) for t in (dh, dS, g, u, Sg, Su, dg, du))
    more = dict(RG=_padded(ranks[0]), RU=_padded(ranks[1]), RD=_padded(ranks[2]), CG=cg is not None, CU=cu is not None, GELU=gelu, PRECISION=_exact(g))
    _launch(KERNELS[name], args, grid, how | more, warm)
    if warm:
        return ()
    dBg, dBu, dA, dcg, dcu = (part.sum(0) for part in (*parts, *scales))
    more = [part.sum(0).to(g.dtype) for part in sums]
    return dg, du, dBg.to(Bg.dtype), dBu.to(Bu.dtype), dA.T.to(A.dtype).contiguous(), dcg, dcu, *more


def candidates(rank: int) -> list[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """(variant, constants, splits to try: these need no compiling)."""
    found: list[Any] = []

    def add(name: str, splits: tuple[int, ...], rows: int, columns: int, warps: int, **more: Any) -> None:
        found.append((name, dict(ROWS=rows, COLUMNS=columns, num_warps=warps, FAST=True, EVICT="evict_first") | more, splits))

    few = rank > 16
    many = (8, 16, 32, 64)
    for rows, columns, warps in ((32, 128, 8), (32, 128, 4), (32, 64, 4), (64, 64, 8)) if not few else ((32, 128, 8), (32, 64, 4)):
        add("fwd_first", (1,), rows, columns, warps)
    tiles = ((32, 128, 8), (32, 128, 4), (16, 128, 4), (32, 64, 4), (64, 64, 4), (64, 64, 8), (64, 128, 8), (16, 256, 4), (32, 256, 8), (16, 128, 2), (16, 64, 2))
    for rows, columns, warps in tiles if not few else tiles[:6]:
        for stages in (2, 3, 4) if not few else (2, 3):
            add("fwd_loop", many, rows, columns, warps, STAGES=stages)
    if not few:
        add("fwd_first", (1,), 32, 128, 8, FAST=False, EVICT="")
        add("fwd_first", (1,), 32, 128, 8, EVICT="")
        add("fwd_loop", many, 32, 128, 8, STAGES=3, FAST=False)
        add("fwd_loop", many, 32, 128, 8, STAGES=3, EVICT="")
        add("fwd_loop", many, 32, 64, 4, STAGES=3, EVICT="")
    some = (4, 8, 16, 32)
    tiles = ((32, 64, 4), (32, 128, 8), (64, 64, 8), (32, 64, 8), (16, 128, 4), (64, 64, 4), (16, 64, 4), (32, 32, 4), (32, 128, 4), (16, 64, 2), (32, 32, 2))
    for rows, columns, warps in tiles if not few else tiles[:4]:
        for name in ("bwd_rows", "bwd_rows_t"):
            for stages in (2, 3):
                add(name, some, rows, columns, warps, STAGES=stages)
                if not few and (rows, columns, warps) in tiles[:3]:
                    add(name, some, rows, columns, warps, STAGES=stages, maxnreg=128)
    if not few:
        add("bwd_rows", some, 32, 64, 4, STAGES=1)
        add("bwd_rows", some, 32, 64, 4, STAGES=4)
        add("bwd_rows", some, 32, 64, 4, STAGES=3, FAST=False)
        add("bwd_rows", some, 32, 64, 4, STAGES=3, EVICT="")
        add("bwd_rows_t", some, 32, 64, 4, STAGES=3, EVICT="")
    if not few:  # wider blocks, whose partial sums would be smaller, spill by kilobytes
        add("bwd_sums", some, 32, 128, 8, STAGES=2)
        add("bwd_sums", some, 16, 128, 8, STAGES=2)
    return found
