"""The backward pass of `weft.kernels.gated` with dS_g = dg B_g and dS_u = du B_u, for which dg and du are not read again.

By columns (`_gated_backward`) each block of columns leaves its part of dS, by rows each block of rows its part of what is summed over
tokens. Parts are in the dtype of g or in fp32, and are added in fp32 and in order, so a run can be repeated bit for bit. A warp should have
16 rows of its own: where warps share rows, Triton repeats the arithmetic in each of them, in the layout that the product dg B takes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.launch import on_its_card
from weft.kernels.triton_gated import SPLITS, _exact, _padded, _rows_of, _slopes, gated_backward_by_columns


@triton.jit
def _summed(parts, dSg, dSu, count, n, rg, ru, sg_row, su_row, DEEP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """parts: (count, n, rg + ru)."""
    size = n.to(tl.int64) * (rg + ru)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    deep = tl.arange(0, DEEP)
    s = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, DEEP):
        there = (start + deep < count)[:, None] & (place < size)[None, :]
        s += tl.sum(tl.load(parts + (start + deep)[:, None] * size + place[None, :], mask=there, other=0.0).to(tl.float32), 0)
    row, k = place // (rg + ru), place % (rg + ru)
    tl.store(dSg + row * sg_row + k, s.to(dSg.dtype.element_ty), mask=(place < size) & (k < rg))
    tl.store(dSu + row * su_row + (k - rg), s.to(dSu.dtype.element_ty), mask=(place < size) & (k >= rg))


@triton.jit
def _gated_backward_and_s(  # type: ignore[no-untyped-def]
    dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, factors, dcg, dcu, parts, n, width, rg, ru, rd, each,
    dh_row, ds_row, g_row, u_row, sg_row, su_row, dg_row, du_row, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, CG: tl.constexpr,
    CU: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first = block * ROWS
    row, column, kg, ku, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, RG), tl.arange(0, RU), tl.arange(0, RD)
    down, below = row[:, None], (first + row < n)[:, None]
    sg, su = _rows_of(Sg, first + row, n, rg, sg_row, RG), _rows_of(Su, first + row, n, ru, su_row, RU)
    ds = _rows_of(dS, first + row, n, rd, ds_row, RD)
    dh, g, u, dg, du = dh + first * dh_row, g + first * g_row, u + first * u_row, dg + first * dg_row, du + first * du_row
    factors, dcg, dcu = factors + block * width * (rg + ru + rd), dcg + block * width, dcu + block * width
    s_g = tl.zeros((ROWS, RG), tl.float32)
    s_u = tl.zeros((ROWS, RU), tl.float32)
    for start in tl.range(0, each, COLUMNS, num_stages=STAGES):
        columns = tl.program_id(1) * each + start + column
        here, across = columns < width, columns[None, :]
        inside = below & here[None, :]
        within = tl.load(g + (down * g_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        beside = tl.load(u + (down * u_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        d = tl.load(dh + (down * dh_row + across), mask=inside, other=0.0, eviction_policy="evict_first")
        bg, bu = _rows_of(Bg, columns, width, rg, rg, RG), _rows_of(Bu, columns, width, ru, ru, RU)
        a = tl.load(A + (k[:, None] * width + across), mask=(k < rd)[:, None] & here[None, :], other=0.0)
        within = within.to(tl.float32) + tl.dot(sg, tl.trans(bg), input_precision=PRECISION)
        beside = beside.to(tl.float32) + tl.dot(su, tl.trans(bu), input_precision=PRECISION)
        d = d.to(tl.float32) + tl.dot(ds, a, input_precision=PRECISION)
        gate, up = within, beside
        if CG:
            scale_g = tl.load(cg + columns, mask=here, other=0.0)[None, :]
            gate = within * scale_g
        if CU:
            scale_u = tl.load(cu + columns, mask=here, other=0.0)[None, :]
            up = beside * scale_u
        dgate, dup, h = _slopes(d, gate, up, GELU)
        if CG:
            tl.store(dcg + columns, tl.sum(dgate * within, 0), mask=here)
            dgate *= scale_g
        if CU:
            tl.store(dcu + columns, tl.sum(dup * beside, 0), mask=here)
            dup *= scale_u
        dgate, dup, h = dgate.to(dg.dtype.element_ty), dup.to(dg.dtype.element_ty), h.to(dg.dtype.element_ty)
        tl.store(dg + (down * dg_row + across), dgate, mask=inside)
        tl.store(du + (down * du_row + across), dup, mask=inside)
        s_g += tl.dot(dgate, bg, input_precision=PRECISION)
        s_u += tl.dot(dup, bu, input_precision=PRECISION)
        of_g = tl.dot(tl.trans(dgate), sg, input_precision=PRECISION).to(factors.dtype.element_ty)
        of_u = tl.dot(tl.trans(dup), su, input_precision=PRECISION).to(factors.dtype.element_ty)
        of_a = tl.dot(tl.trans(h), ds, input_precision=PRECISION).to(factors.dtype.element_ty)
        place = factors + columns[:, None] * (rg + ru + rd)
        tl.store(place + kg[None, :], of_g, mask=here[:, None] & (kg < rg)[None, :])
        tl.store(place + (rg + ku[None, :]), of_u, mask=here[:, None] & (ku < ru)[None, :])
        tl.store(place + (rg + ru + k[None, :]), of_a, mask=here[:, None] & (k < rd)[None, :])
    place = parts + (tl.program_id(1).to(tl.int64) * n + first) * (rg + ru) + down * (rg + ru)
    tl.store(place + kg[None, :], s_g.to(parts.dtype.element_ty), mask=below & (kg < rg)[None, :])
    tl.store(place + (rg + ku[None, :]), s_u.to(parts.dtype.element_ty), mask=below & (ku < ru)[None, :])


def _added(parts: Tensor, dSg: Tensor, dSu: Tensor) -> None:
    count, n, both = parts.shape
    grid: Any = (-(-n * both // 512),)
    _summed[grid](parts, dSg, dSu, count, n, dSg.shape[1], dSu.shape[1], dSg.stride(0), dSu.stride(0), DEEP=16, BLOCK=512, num_warps=4)


@on_its_card
def by_columns(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None,
    cu: Tensor | None = None, gelu: bool = False, dg: Tensor | None = None, du: Tensor | None = None, dSg: Tensor | None = None,
    dSu: Tensor | None = None, rows: int = 32, columns: int = 128, warps: int = 8, stages: int = 3, splits: int = SPLITS,
    wide: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `gated_backward_reference`, and dS_g and dS_u behind it, whose parts are (width / columns, n, r_g + r_u). wide: parts in fp32."""
    (n, width), ranks = g.shape, (Sg.shape[1], Su.shape[1])
    dSg, dSu = (g.new_empty(n, r) if d is None else d for d, r in zip((dSg, dSu), ranks, strict=True))
    parts = g.new_empty(-(-width // columns), n, sum(ranks), dtype=torch.float32 if wide else g.dtype)
    how = rows, columns, warps, stages, splits
    found = gated_backward_by_columns(dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu, dg, du, parts, *how)
    _added(parts, dSg, dSu)
    return *found, dSg, dSu


@on_its_card
def by_rows(
    dh: Tensor, dS: Tensor, g: Tensor, u: Tensor, Sg: Tensor, Bg: Tensor, Su: Tensor, Bu: Tensor, A: Tensor, cg: Tensor | None = None,
    cu: Tensor | None = None, gelu: bool = False, dg: Tensor | None = None, du: Tensor | None = None, dSg: Tensor | None = None,
    dSu: Tensor | None = None, rows: int = 128, columns: int = 64, warps: int = 8, stages: int = 3, splits: int = 2, wide: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same; a program goes along its rows and sums dS while it has dg and du. Parts of what is summed over tokens are (n / rows, width,
    r_g + r_u + r_d)."""
    (n, width), ranks = g.shape, (Sg.shape[1], Su.shape[1], dS.shape[1])
    dg, du = (g.new_empty(n, width) if d is None else d for d in (dg, du))
    dSg, dSu = (g.new_empty(n, r) if d is None else d for d, r in zip((dSg, dSu), ranks, strict=False))
    blocks = -(-n // rows)
    factors = g.new_empty(blocks, width, sum(ranks), dtype=torch.float32 if wide else g.dtype)
    scales = [g.new_empty(blocks, 0 if c is None else width, dtype=torch.float32) for c in (cg, cu)]
    parts = g.new_empty(splits, n, ranks[0] + ranks[1], dtype=torch.float32)
    each = -(-width // (splits * columns)) * columns
    grid: Any = (blocks, splits)
    _gated_backward_and_s[grid](
        dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, dg, du, factors, *scales, parts, n, width, *ranks, each,
        *(t.stride(0) for t in (dh, dS, g, u, Sg, Su, dg, du)), RG=_padded(ranks[0]), RU=_padded(ranks[1]), RD=_padded(ranks[2]),
        CG=cg is not None, CU=cu is not None, GELU=gelu, ROWS=rows, COLUMNS=columns, STAGES=stages, PRECISION=_exact(g), num_warps=warps,
    )  # fmt: skip
    _added(parts, dSg, dSu)
    dBg, dBu, dA = factors.sum(0, dtype=torch.float32).split(ranks, 1)
    dcg, dcu = (scale.sum(0) for scale in scales)
    return dg, du, dBg.to(Bg.dtype).contiguous(), dBu.to(Bu.dtype).contiguous(), dA.T.to(A.dtype).contiguous(), dcg, dcu, dSg, dSu
