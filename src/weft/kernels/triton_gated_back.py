"""The backward pass of `weft.kernels.gated` with dS_g = dg B_g and dS_u = du B_u, for which dg and du are not read again.

A program goes down its columns, where each block of columns leaves its part of dS, or along its rows, where each block of rows leaves its
part of what is summed over tokens. Parts are added in fp32 and in order, so a run can be repeated bit for bit. In a pair two blocks share
one part, and so halve what parts take; one is worked on after the other, since two at once would not fit into the registers.

Each warp has 16 rows of its own. Where warps share rows, Triton repeats the whole arithmetic in each of them, in the layout in which the
product dg B takes dg: four times as many special functions and 118 instructions an element for 34.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.launch import on_its_card
from weft.kernels.triton_gated import _exact, _padded, _rows_of, _slopes


@triton.jit
def _summed(  # type: ignore[no-untyped-def]
    parts, one, two, three, count, m, r1, r2, r3, row_1, row_2, row_3, column_3, DEEP: tl.constexpr, BLOCK: tl.constexpr
):
    """parts: (count, m, r1 + r2 + r3), whose sum is cut into three."""
    size = tl.full((), 1, tl.int64) * m * (r1 + r2 + r3)  # m may be a constant, as 1 is
    place, deep = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DEEP)
    s = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, DEEP):
        there = (start + deep < count)[:, None] & (place < size)[None, :]
        s += tl.sum(tl.load(parts + (start + deep)[:, None] * size + place[None, :], mask=there, other=0.0).to(tl.float32), 0)
    row, k = place // (r1 + r2 + r3), place % (r1 + r2 + r3)
    here = place < size
    tl.store(one + row * row_1 + k, s.to(one.dtype.element_ty), mask=here & (k < r1))
    tl.store(two + row * row_2 + (k - r1), s.to(two.dtype.element_ty), mask=here & (k >= r1) & (k < r1 + r2))
    tl.store(three + row * row_3 + (k - r1 - r2) * column_3, s.to(three.dtype.element_ty), mask=here & (k >= r1 + r2))


@triton.jit
def _left(place, m, row, r, behind, s, R: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a part, which are `row` long, from `behind` on; m of them are there."""
    k, down = tl.arange(0, R), tl.arange(0, ROWS)[:, None]
    tl.store(place + (down * row + behind + k[None, :]), s.to(place.dtype.element_ty), mask=(down < m) & (k < r)[None, :])


@triton.jit
def _scale(c, columns, width, THERE: tl.constexpr):  # type: ignore[no-untyped-def]
    if THERE:
        return tl.load(c + columns, mask=columns < width, other=0.0)[None, :]
    else:
        return 1.0


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    dh, g, u, dg, du, columns, m, width, dh_row, g_row, u_row, dg_row, du_row, sg, su, ds, bg, bu, a, scale_g, scale_u, sum_g, sum_u, sum_a,
    s_g, s_u, ALONG: tl.constexpr, CG: tl.constexpr, CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes m rows of dg and du and adds to the five sums; with what comes back to c_g and c_u.

    Products with the sums that go on through the loop come first where it goes along rows: left on their way while the next block is
    loaded, they would make the assembler run every product of the loop by itself.
    """
    down, across = tl.arange(0, ROWS)[:, None], columns[None, :]
    inside = (down < m) & (across < width)
    within = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
    beside = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
    d = tl.load(dh + (down * dh_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
    within = within.to(tl.float32) + tl.dot(sg, tl.trans(bg), input_precision=PRECISION)
    beside = beside.to(tl.float32) + tl.dot(su, tl.trans(bu), input_precision=PRECISION)
    d = d.to(tl.float32) + tl.dot(ds, a, input_precision=PRECISION)
    gate = within * scale_g if CG else within
    up = beside * scale_u if CU else beside
    dgate, dup, h = _slopes(d, gate, up, GELU)
    of_cg, of_cu = 0.0, 0.0
    if CG:
        of_cg = tl.sum(dgate * within, 0)
        dgate *= scale_g
    if CU:
        of_cu = tl.sum(dup * beside, 0)
        dup *= scale_u
    dgate, dup, h = dgate.to(dg.dtype.element_ty), dup.to(dg.dtype.element_ty), h.to(dg.dtype.element_ty)
    tl.store(dg + (down * dg_row + across), dgate, mask=inside)
    tl.store(du + (down * du_row + across), dup, mask=inside)
    if ALONG:
        s_g += tl.dot(dgate, bg, input_precision=PRECISION)
        s_u += tl.dot(dup, bu, input_precision=PRECISION)
    sum_g += tl.dot(tl.trans(dgate), sg, input_precision=PRECISION)
    sum_u += tl.dot(tl.trans(dup), su, input_precision=PRECISION)
    sum_a += tl.dot(tl.trans(h), ds, input_precision=PRECISION)
    if not ALONG:
        s_g += tl.dot(dgate, bg, input_precision=PRECISION)
        s_u += tl.dot(dup, bu, input_precision=PRECISION)
    return sum_g, sum_u, sum_a, s_g, s_u, of_cg, of_cu


@triton.jit
def _by_columns(  # type: ignore[no-untyped-def]
    dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, factors, parts, dcg, dcu, n, width, rg, ru, rd, each,
    dh_row, ds_row, g_row, u_row, sg_row, su_row, dg_row, du_row, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """each: rows of a split."""
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RD)
    group: tl.constexpr = 2 * COLUMNS if PAIR else COLUMNS
    columns = tl.program_id(0) * group + column
    bg, bu = _rows_of(Bg, columns, width, rg, rg, RG), _rows_of(Bu, columns, width, ru, ru, RU)
    a = tl.load(A + (k[:, None] * width + columns[None, :]), mask=(k < rd)[:, None] & (columns < width)[None, :], other=0.0)
    scale_g, scale_u = _scale(cg, columns, width, CG), _scale(cu, columns, width, CU)
    sum_g, sum_cg = tl.zeros((COLUMNS, RG), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    sum_u, sum_cu = tl.zeros((COLUMNS, RU), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    sum_a = tl.zeros((COLUMNS, RD), tl.float32)
    if PAIR:
        others = columns + COLUMNS
        bg1, bu1 = _rows_of(Bg, others, width, rg, rg, RG), _rows_of(Bu, others, width, ru, ru, RU)
        a1 = tl.load(A + (k[:, None] * width + others[None, :]), mask=(k < rd)[:, None] & (others < width)[None, :], other=0.0)
        scale_g1, scale_u1 = _scale(cg, others, width, CG), _scale(cu, others, width, CU)
        sum_g1, sum_u1, sum_a1, sum_cg1, sum_cu1 = sum_g, sum_u, sum_a, sum_cg, sum_cu
    for start in tl.range(0, each, ROWS, num_stages=STAGES):
        first = split * each + start
        m = (n - first).to(tl.int32)  # rows from here on, and none below 0
        sg, su = _rows_of(Sg + first * sg_row, row, m, rg, sg_row, RG), _rows_of(Su + first * su_row, row, m, ru, su_row, RU)
        ds = _rows_of(dS + first * ds_row, row, m, rd, ds_row, RD)
        s_g, s_u = tl.zeros((ROWS, RG), tl.float32), tl.zeros((ROWS, RU), tl.float32)
        dh_, g_, u_, dg_, du_ = dh + first * dh_row, g + first * g_row, u + first * u_row, dg + first * dg_row, du + first * du_row
        sum_g, sum_u, sum_a, s_g, s_u, of_cg, of_cu = _block(
            dh_, g_, u_, dg_, du_, columns, m, width, dh_row, g_row, u_row, dg_row, du_row, sg, su, ds, bg, bu, a, scale_g, scale_u,
            sum_g, sum_u, sum_a, s_g, s_u, False, CG, CU, GELU, ROWS, PRECISION
        )  # fmt: skip
        sum_cg += of_cg
        sum_cu += of_cu
        if PAIR:
            sum_g1, sum_u1, sum_a1, s_g, s_u, of_cg, of_cu = _block(
                dh_, g_, u_, dg_, du_, others, m, width, dh_row, g_row, u_row, dg_row, du_row, sg, su, ds, bg1, bu1, a1, scale_g1, scale_u1,
                sum_g1, sum_u1, sum_a1, s_g, s_u, False, CG, CU, GELU, ROWS, PRECISION
            )  # fmt: skip
            sum_cg1 += of_cg
            sum_cu1 += of_cu
        place = parts + (block * n + first) * (rg + ru)
        _left(place, m, rg + ru, rg, 0, s_g, RG, ROWS)
        _left(place, m, rg + ru, ru, rg, s_u, RU, ROWS)
    first = block * group
    total = rg + ru + rd
    m = (width - first).to(tl.int32)
    place, dcg, dcu = factors + (split * width + first) * total, dcg + (split * width + first), dcu + (split * width + first)
    _left(place, m, total, rg, 0, sum_g, RG, COLUMNS)
    _left(place, m, total, ru, rg, sum_u, RU, COLUMNS)
    _left(place, m, total, rd, rg + ru, sum_a, RD, COLUMNS)
    if CG:
        tl.store(dcg + column, sum_cg, mask=column < m)
    if CU:
        tl.store(dcu + column, sum_cu, mask=column < m)
    if PAIR:
        place, dcg, dcu, m = place + COLUMNS * total, dcg + COLUMNS, dcu + COLUMNS, m - COLUMNS
        _left(place, m, total, rg, 0, sum_g1, RG, COLUMNS)
        _left(place, m, total, ru, rg, sum_u1, RU, COLUMNS)
        _left(place, m, total, rd, rg + ru, sum_a1, RD, COLUMNS)
        if CG:
            tl.store(dcg + column, sum_cg1, mask=column < m)
        if CU:
            tl.store(dcu + column, sum_cu1, mask=column < m)


@triton.jit
def _by_rows(  # type: ignore[no-untyped-def]
    dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, factors, parts, dcg, dcu, n, width, rg, ru, rd, each,
    dh_row, ds_row, g_row, u_row, sg_row, su_row, dg_row, du_row, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """each: columns of a split."""
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RD)
    first = block * (2 * ROWS if PAIR else ROWS)
    m = (n - first).to(tl.int32)
    Sg, Su, dS = Sg + first * sg_row, Su + first * su_row, dS + first * ds_row
    dh, g, u, dg, du = dh + first * dh_row, g + first * g_row, u + first * u_row, dg + first * dg_row, du + first * du_row
    sg, su, ds = _rows_of(Sg, row, m, rg, sg_row, RG), _rows_of(Su, row, m, ru, su_row, RU), _rows_of(dS, row, m, rd, ds_row, RD)
    s_g, s_u = tl.zeros((ROWS, RG), tl.float32), tl.zeros((ROWS, RU), tl.float32)
    if PAIR:
        others = row + ROWS
        sg1, su1 = _rows_of(Sg, others, m, rg, sg_row, RG), _rows_of(Su, others, m, ru, su_row, RU)
        ds1 = _rows_of(dS, others, m, rd, ds_row, RD)
        s_g1, s_u1 = s_g, s_u
        further = tl.full((), ROWS, tl.int64)
        dh1, g1, u1 = dh + further * dh_row, g + further * g_row, u + further * u_row
        dg1, du1 = dg + further * dg_row, du + further * du_row
    total = rg + ru + rd
    factors, dcg, dcu = factors + block * width * total, dcg + block * width, dcu + block * width
    for start in tl.range(0, each, COLUMNS, num_stages=STAGES):
        begin = tl.program_id(1) * each + start
        columns = begin + column
        bg, bu = _rows_of(Bg, columns, width, rg, rg, RG), _rows_of(Bu, columns, width, ru, ru, RU)
        a = tl.load(A + (k[:, None] * width + columns[None, :]), mask=(k < rd)[:, None] & (columns < width)[None, :], other=0.0)
        scale_g, scale_u = _scale(cg, columns, width, CG), _scale(cu, columns, width, CU)
        sum_g, sum_u = tl.zeros((COLUMNS, RG), tl.float32), tl.zeros((COLUMNS, RU), tl.float32)
        sum_a = tl.zeros((COLUMNS, RD), tl.float32)
        sum_g, sum_u, sum_a, s_g, s_u, of_cg, of_cu = _block(
            dh, g, u, dg, du, columns, m, width, dh_row, g_row, u_row, dg_row, du_row, sg, su, ds, bg, bu, a, scale_g, scale_u,
            sum_g, sum_u, sum_a, s_g, s_u, True, CG, CU, GELU, ROWS, PRECISION
        )  # fmt: skip
        if PAIR:
            sum_g, sum_u, sum_a, s_g1, s_u1, of_cg1, of_cu1 = _block(
                dh1, g1, u1, dg1, du1, columns, m - ROWS, width, dh_row, g_row, u_row, dg_row, du_row, sg1, su1, ds1, bg, bu, a,
                scale_g, scale_u, sum_g, sum_u, sum_a, s_g1, s_u1, True, CG, CU, GELU, ROWS, PRECISION
            )  # fmt: skip
            of_cg, of_cu = of_cg + of_cg1, of_cu + of_cu1
        place = factors + begin * total
        _left(place, width - begin, total, rg, 0, sum_g, RG, COLUMNS)
        _left(place, width - begin, total, ru, rg, sum_u, RU, COLUMNS)
        _left(place, width - begin, total, rd, rg + ru, sum_a, RD, COLUMNS)
        if CG:
            tl.store(dcg + columns, of_cg, mask=columns < width)
        if CU:
            tl.store(dcu + columns, of_cu, mask=columns < width)
    place = parts + (split * n + first) * (rg + ru)
    _left(place, m, rg + ru, rg, 0, s_g, RG, ROWS)
    _left(place, m, rg + ru, ru, rg, s_u, RU, ROWS)
    if PAIR:
        place += ROWS * (rg + ru)
        _left(place, m - ROWS, rg + ru, rg, 0, s_g1, RG, ROWS)
        _left(place, m - ROWS, rg + ru, ru, rg, s_u1, RU, ROWS)


def _added(parts: Tensor, one: Tensor, two: Tensor, three: Tensor | None = None) -> None:
    """The sum over the first axis of parts, its columns cut into what is given; the third turned round."""
    count, m, width = parts.shape
    r1, r2 = one.shape[1], two.shape[1]
    last, row, column = (two, 0, 0) if three is None else (three, 1, three.stride(0))
    grid: Any = (-(-m * width // 512),)
    _summed[grid](
        parts, one, two, last, count, m, r1, r2, width - r1 - r2, one.stride(0), two.stride(0), row, column, DEEP=16, BLOCK=512, num_warps=4
    )  # fmt: skip


@on_its_card
def gated_backward_and_s(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None,
    cu: Tensor | None = None, gelu: bool = False, dg: Tensor | None = None, du: Tensor | None = None, dSg: Tensor | None = None,
    dSu: Tensor | None = None, by: str = "columns", rows: int = 64, columns: int = 64, warps: int | None = None, stages: int = 2,
    splits: int = 4, pair: bool = False, wide: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `gated_backward_reference`, and dS_g and dS_u behind it. What has a row for each token may be columns of a wider tensor.

    by: "columns" leaves parts of dS for each block (or pair) of `columns`, "rows" parts of what is summed over tokens for each of `rows`;
    wide: these in fp32 instead of the dtype of g. splits: in how many the other axis is cut; their parts are in fp32 always.
    """
    (n, width), ranks = g.shape, (Sg.shape[1], Su.shape[1], dS.shape[1])
    dg, du, dSg, dSu = (g.new_empty(n, r) if d is None else d for d, r in zip((dg, du, dSg, dSu), (width, width, *ranks[:2]), strict=True))
    down, (axis, other) = by == "columns", (width, n) if by == "columns" else (n, width)
    step, inner = (columns, rows) if down else (rows, columns)
    blocks, each = -(-axis // (2 * step if pair else step)), -(-other // (splits * inner)) * inner
    many, few = torch.float32 if wide else g.dtype, torch.float32
    factors = g.new_empty(splits if down else blocks, width, sum(ranks), dtype=few if down else many)
    parts = g.new_empty(blocks if down else splits, n, ranks[0] + ranks[1], dtype=many if down else few)
    scales = [g.new_empty(len(factors), 0 if c is None else width, dtype=torch.float32) for c in (cg, cu)]
    grid: Any = (blocks, splits)
    (_by_columns if down else _by_rows)[grid](
        dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, factors, parts, *scales, n, width, *ranks, each,
        *(t.stride(0) for t in (dh, dS, g, u, Sg, Su, dg, du)), RG=_padded(ranks[0]), RU=_padded(ranks[1]), RD=_padded(ranks[2]),
        CG=cg is not None, CU=cu is not None, GELU=gelu, PAIR=pair, ROWS=rows, COLUMNS=columns, STAGES=stages, PRECISION=_exact(g),
        num_warps=rows // 16 if warps is None else warps,
    )  # fmt: skip
    dBg, dBu, dA = torch.empty_like(Bg), torch.empty_like(Bu), torch.empty_like(A)
    _added(parts, dSg, dSu)
    _added(factors, dBg, dBu, dA)
    dcg, dcu = (scale.sum(0) for scale in scales)
    return dg, du, dBg, dBu, dA, dcg, dcu, dSg, dSu
