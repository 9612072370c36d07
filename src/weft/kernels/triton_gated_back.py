"""The backward pass of `weft.kernels.gated` with dS_g = dg B_g and dS_u = du B_u, for which dg and du are not read again; of LoRA alone.

A program goes along its rows and sums dS while it has dg and du; of what is summed over tokens each block of rows leaves a part. Parts are
added in fp32 and in order, so a run can be repeated bit for bit. Each warp has 16 rows of its own: where warps share rows, Triton repeats
the whole arithmetic in each of them, in the layout in which the product dg B takes dg.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.launch import on_its_card
from weft.kernels.triton_gated import SHARED, _exact, _padded, _rows_of, _shared, _slopes, gated_backward_triton

# Up to which rank, in which blocks and of how many programs: two for each processor of an H100. `bench/gated.py --backward` tries them. At
# rank 64 the parts are as large as what they spare, and sums of columns, for DoRA's c, cost more than it.
SUMMED = {16: dict(rows=128, columns=64, stages=3, programs=256)}


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
def _gated_backward_and_s(  # type: ignore[no-untyped-def]
    dh, dS, g, u, Sg, Bg, Su, Bu, A, dg, du, factors, parts, n, width, rg, ru, rd, each, dh_row, ds_row, g_row, u_row, sg_row, su_row,
    dg_row, du_row, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """each: columns of a split. factors: (blocks of rows, width, rg + ru + rd). parts: (splits, n, rg + ru)."""
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RD)
    first, total = block * ROWS, rg + ru + rd
    m, down = (n - first).to(tl.int32), row[:, None]
    sg, su = _rows_of(Sg + first * sg_row, row, m, rg, sg_row, RG), _rows_of(Su + first * su_row, row, m, ru, su_row, RU)
    ds = _rows_of(dS + first * ds_row, row, m, rd, ds_row, RD)
    dh, g, u, dg, du = dh + first * dh_row, g + first * g_row, u + first * u_row, dg + first * dg_row, du + first * du_row
    s_g, s_u = tl.zeros((ROWS, RG), tl.float32), tl.zeros((ROWS, RU), tl.float32)
    for start in tl.range(0, each, COLUMNS, num_stages=STAGES):
        begin = tl.program_id(1) * each + start
        columns = begin + column
        inside, across = (down < m) & (columns < width)[None, :], columns[None, :]
        bg, bu = _rows_of(Bg, columns, width, rg, rg, RG), _rows_of(Bu, columns, width, ru, ru, RU)
        a = tl.load(A + (k[:, None] * width + across), mask=(k < rd)[:, None] & (columns < width)[None, :], other=0.0)
        gate = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        up = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        d = tl.load(dh + (down * dh_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        gate = gate.to(tl.float32) + tl.dot(sg, tl.trans(bg), input_precision=PRECISION)
        up = up.to(tl.float32) + tl.dot(su, tl.trans(bu), input_precision=PRECISION)
        d = d.to(tl.float32) + tl.dot(ds, a, input_precision=PRECISION)
        dgate, dup, h = _slopes(d, gate, up, GELU)
        dgate, dup, h = dgate.to(dg.dtype.element_ty), dup.to(dg.dtype.element_ty), h.to(dg.dtype.element_ty)
        tl.store(dg + (down * dg_row + across), dgate, mask=inside)
        tl.store(du + (down * du_row + across), dup, mask=inside)
        # These two first: left on their way while the next block is loaded, they would make the assembler run every product by itself.
        s_g += tl.dot(dgate, bg, input_precision=PRECISION)
        s_u += tl.dot(dup, bu, input_precision=PRECISION)
        place = factors + (block * width + begin) * total
        _left(place, width - begin, total, rg, 0, tl.dot(tl.trans(dgate), sg, input_precision=PRECISION), RG, COLUMNS)
        _left(place, width - begin, total, ru, rg, tl.dot(tl.trans(dup), su, input_precision=PRECISION), RU, COLUMNS)
        _left(place, width - begin, total, rd, rg + ru, tl.dot(tl.trans(h), ds, input_precision=PRECISION), RD, COLUMNS)
    place = parts + (split * n + first) * (rg + ru)
    _left(place, m, rg + ru, rg, 0, s_g, RG, ROWS)
    _left(place, m, rg + ru, ru, rg, s_u, RU, ROWS)


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
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, gelu: bool = False,
    dg: Tensor | None = None, du: Tensor | None = None, dSg: Tensor | None = None, dSu: Tensor | None = None, rows: int = 128,
    columns: int = 64, stages: int = 3, splits: int = 4,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dg, du, and the gradients of Bg, Bu, A, Sg and Su). What has a row for each token may be columns of a wider tensor.

    What is summed over tokens is rounded once for each block of `rows`, then added in fp32.
    """
    (n, width), ranks = g.shape, (Sg.shape[1], Su.shape[1], dS.shape[1])
    dg, du, dSg, dSu = (g.new_empty(n, r) if d is None else d for d, r in zip((dg, du, dSg, dSu), (width, width, *ranks[:2]), strict=True))
    blocks, each = -(-n // rows), -(-width // (splits * columns)) * columns
    factors = g.new_empty(blocks, width, sum(ranks))
    parts = g.new_empty(splits, n, ranks[0] + ranks[1], dtype=torch.float32)
    grid: Any = (blocks, splits)
    _gated_backward_and_s[grid](
        dh, dS, g, u, Sg, Bg, Su, Bu, A, dg, du, factors, parts, n, width, *ranks, each,
        *(t.stride(0) for t in (dh, dS, g, u, Sg, Su, dg, du)), RG=_padded(ranks[0]), RU=_padded(ranks[1]), RD=_padded(ranks[2]),
        GELU=gelu, ROWS=rows, COLUMNS=columns, STAGES=stages, PRECISION=_exact(g), num_warps=rows // 16,
    )  # fmt: skip
    dBg, dBu, dA = torch.empty_like(Bg), torch.empty_like(Bu), torch.empty_like(A)
    _added(parts, dSg, dSu)
    _added(factors, dBg, dBu, dA)
    return dg, du, dBg, dBu, dA, dSg, dSu


def gated_backward_and_s_triton(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None,
    cu: Tensor | None = None, gelu: bool = False, dg: Tensor | None = None, du: Tensor | None = None, dSg: Tensor | None = None,
    dSu: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `gated_backward_and_s_reference`. What has a row for each token may be columns of a wider tensor."""
    (n, width), rank = g.shape, max(Sg.shape[1], Su.shape[1], A.shape[0])
    how = next((how for most, how in SUMMED.items() if rank <= most and g.itemsize == 2), None)
    if how is None or cg is not None or cu is not None or _shared(g.device) < SHARED:
        dg, du, *found = gated_backward_triton(dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu, dg, du)
        return dg, du, *found, torch.mm(dg, Bg, out=dSg), torch.mm(du, Bu, out=dSu)
    rows, columns, stages, programs = (how[name] for name in ("rows", "columns", "stages", "programs"))
    splits = max(1, min(programs // -(-n // rows), -(-width // columns)))
    *found, dSg, dSu = gated_backward_and_s(dh, dS, g, u, Sg, Bg, Su, Bu, A, gelu, dg, du, dSg, dSu, rows, columns, stages, splits)
    return *found, g.new_empty(0), g.new_empty(0), dSg, dSu
