"""The fused inside of gated MLPs: how near its two kernels come to the rate of a plain copy.

    python bench/gated.py            # bench/results/gated.json
    python bench/gated.py --tune     # blocks and splits for its kernels, each choice first held against the plain twin
    python bench/gated.py --forward  # the forward kernel that sums S itself, against the one that leaves it to a product
    python bench/gated.py --backward # the backward kernels that give dS = dg B themselves, against the one that leaves them to products

Times are medians of CUDA-event timings, what is launched around a kernel (the sums of partial results, S) included. Bytes are the tensors
of the MLP's width that have to be moved, three forward and five back; the yardstick is a copy from device to device in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save

from weft.kernels.gated import gated_backward_reference, gated_reference
from weft.kernels.stacked import padded
from weft.kernels.triton_gated import gated_backward_triton, gated_by_columns, gated_by_rows, gated_triton
from weft.kernels.triton_gated_back import gated_backward_and_s

TOKENS, WIDTHS, RANKS = 8192, {"8B": 14336, "1B": 8192, "0.6B": 3072}, (16, 64)
DEVICE = "cuda"


def made(n: int, width: int, rank: int, dora: bool = False, gelu: bool = False, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """(dh, dS, g, u, Sg, Bg, Su, Bu, A, cg, cu, gelu)"""
    shapes = ((n, width), (n, rank), (n, width), (n, width), (n, rank), (width, rank), (n, rank), (width, rank), (rank, width))
    factors = [torch.randn(s, device=DEVICE, dtype=dtype) / (4 if i > 3 else 1) for i, s in enumerate(shapes)]
    c = [1 + torch.rand(width, device=DEVICE) if dora else None for _ in range(2)]
    return *factors, *c, gelu


def inner(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the forward pass takes of it."""
    return given[2:]


def stacked(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same for the forward pass, g, u, Sg and Su as columns of one tensor as in `weft.kernels.gated_stacked`."""
    g, u, Sg, Bg, Su, *rest = inner(given)
    parts = g, u, Sg, Su
    Z = g.new_empty(len(g), 2 * g.shape[1] + padded(Sg.shape[1] + Su.shape[1]))
    places = Z[:, : sum(t.shape[1] for t in parts)].split([t.shape[1] for t in parts], 1)
    g, u, Sg, Su = (place.copy_(t) for place, t in zip(places, parts, strict=True))
    return g, u, Sg, Bg, Su, *rest


def milliseconds(work: Callable[[], Any], rounds: int = 5, times: int = 6) -> float:
    """Median of `rounds`, each `times` in a row, so that launching is not what is measured."""
    work()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / times)
    return sorted(found)[rounds // 2]


def copy_rate() -> float:
    """TB/s, read and written."""
    a = torch.empty(TOKENS, WIDTHS["8B"], device=DEVICE, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) / 1e9


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def rates() -> list[dict[str, Any]]:
    rows = []
    copy = copy_rate()
    print(f"a copy moves {copy:.2f} TB/s")
    for shape, width in WIDTHS.items():
        for rank in RANKS:
            for dora in (False, True):
                for gelu in (False, True):
                    given = made(TOKENS, width, rank, dora, gelu)
                    works = {"forward": (3, lambda: gated_triton(*inner(given))), "backward": (5, lambda: gated_backward_triton(*given))}
                    row: dict[str, Any] = {"shape": shape, "width": width, "rank": rank, "method": "DoRA" if dora else "LoRA"}
                    row |= {"act": "GELU" if gelu else "SiLU"}
                    for name, (passes, work) in works.items():
                        ms = milliseconds(work)
                        rate = passes * given[0].nbytes / ms / 1e9
                        row[name] = {"ms": round(ms, 4), "TB/s": round(rate, 3), "of_copy": round(rate / copy, 3)}
                    rows.append(row)
                    print(shape, width, rank, row["method"], row["act"], row["forward"], row["backward"], flush=True)
    return [{"copy_TB/s": round(copy, 3)}, *rows]


def tune(budget: float) -> list[dict[str, Any]]:
    """The best blocks for each width and rank; nothing new is begun after `budget` seconds."""
    began, copy, rows = time.perf_counter(), copy_rate(), []
    print(f"a copy moves {copy:.2f} TB/s")
    for rank in RANKS:
        small = made(528, 1040, rank)  # blocks that are cut off both ways, and divisible by 16 as the real ones are, so compiled alike
        exact = tuple(t.double() if torch.is_tensor(t) else t for t in small)
        wants = gated_reference(*inner(exact)), gated_backward_reference(*exact)[:5]
        works: tuple[Callable[..., Any], ...] = gated_by_columns, gated_backward_triton
        for way, passes, work, want, given in zip(("forward", "back"), (3, 5), works, wants, (inner(small), small), strict=True):
            able = []
            for block, columns, warps in itertools.product((16, 32, 64), (64, 128), (4, 8)):
                how = dict(rows=block, columns=columns, warps=warps)
                found = work(*given, **how)
                if max(distance(a, b) for a, b in zip(found, want, strict=False)) <= 1e-2:
                    able.append(how)
            for shape, width in WIDTHS.items():
                full = made(TOKENS, width, rank)
                full = inner(full) if way == "forward" else full
                tried = [
                    (milliseconds(lambda: work(*full, **how, splits=splits), 3, 4), how | {"splits": splits})
                    for how in able for splits in (4, 8, 16, 32, 64) if time.perf_counter() - began < budget
                ]  # fmt: skip
                tried.sort(key=lambda t: t[0])
                own = milliseconds(lambda: work(*full))
                bytes_moved = passes * TOKENS * width * 2
                print(f"{shape}, rank {rank}, {way}: as it is {own:.3f} ms", flush=True)
                for ms, how in tried[:4]:
                    print(f"  {ms:.3f} ms, {bytes_moved / ms / 1e9 / copy:.2f} of a copy's rate: {how}", flush=True)
                rows.append({"shape": shape, "rank": rank, "way": way, "as_it_is_ms": own, "copy_TB/s": copy, "best": tried[:4]})
    return rows


def agrees(work: Callable[..., Any], given: tuple[Any, ...], want: tuple[torch.Tensor, ...], how: dict[str, int]) -> bool:
    """Whether this choice can be launched, equals the plain twin and repeats itself bit for bit; says so where not."""
    try:
        found, again = ([t for t in work(*given, **how, splits=3) if t.numel()] for _ in range(2))
        error = max(distance(a, b) for a, b in zip(found, want, strict=True))
    except Exception as e:  # whatever a compiler or a launch can raise, among it shared memory or registers that are not there
        print(f"  not {work.__name__} {how}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", flush=True)
        return False
    same = all(map(torch.equal, found, again))
    if error > 1e-2 or not same:
        repeated = "the same" if same else "something else"
        print(f"  WRONG {work.__name__} {how}: {error:.1e} from the twin, {repeated} when repeated", flush=True)
    return error <= 1e-2 and same


def fitting(
    work: Callable[..., Any], hows: list[dict[str, Any]], given: tuple[Any, ...], want: tuple[torch.Tensor, ...], left: Callable[[], bool],
    what: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Those choices that `agrees` takes, compiled side by side; none is begun once no time is left."""
    start = time.perf_counter()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        fits = list(pool.map(lambda how: left() and agrees(work, given, want, how), hows))
    able = [how for how, fit in zip(hows, fits, strict=True) if fit]
    print(f"{what}: {len(able)} of {len(hows)}, {time.perf_counter() - start:.0f} s", flush=True)
    return able


def forward(budget: float) -> list[dict[str, Any]]:
    """h and S at once over blocks, stages and splits, with DoRA those that were best with LoRA; as `tune` it ends in time."""
    began, copy, rows = time.perf_counter(), copy_rate(), []
    print(f"a copy moves {copy:.2f} TB/s", flush=True)

    def left() -> bool:
        return time.perf_counter() - began < budget

    for rank in RANKS:
        best: list[dict[str, int]] = []
        for dora in (False, True):
            hows = [
                dict(rows=block, columns=columns, stages=stages)
                for block, columns, stages in itertools.product((32, 64, 128), (32, 64, 128), (2, 3, 4, 6))
            ]
            hows = [how for how in hows if how in best] if dora else hows
            small = made(528, 1040, rank, dora)  # as in `tune`
            want = gated_reference(*inner(tuple(t.double() if torch.is_tensor(t) else t for t in small)))
            given = stacked(small)
            gated_by_columns(*given)  # what Triton sets up once is there before threads come
            able = fitting(gated_by_rows, hows, given, want, left, f"rank {rank}, {'DoRA' if dora else 'LoRA'}")
            for shape, width in WIDTHS.items():
                full = stacked(made(TOKENS, width, rank, dora))
                h, A = full[0].contiguous(), full[6]
                today, product = milliseconds(lambda: gated_by_columns(*full)), milliseconds(lambda: h @ A.T)
                tried = [
                    (milliseconds(lambda: gated_by_rows(*full, **how, splits=splits), 3, 4), how | {"splits": splits})
                    for how in able for splits in (1, 2, 3, 4, 6, 8, 12) if left()
                ]  # fmt: skip
                tried.sort(key=lambda t: t[0])
                best += [{k: v for k, v in how.items() if k != "splits"} for _, how in tried[:4]]
                row: dict[str, Any] = {"shape": shape, "rank": rank, "method": "DoRA" if dora else "LoRA"}
                rows.append(row | {"by_columns_ms": today, "of_it_the_product_ms": product, "copy_TB/s": copy, "by_rows": tried[:8]})
                print(f"{shape}, rank {rank}, {row['method']}: by columns {today:.4f} ms, of it the product {product:.4f}", flush=True)
                for ms, how in tried[:6]:
                    rate = 3 * h.nbytes / ms / 1e9 / copy
                    print(f"  {ms:.4f} ms, {today - ms:+.4f} less, {rate:.2f} of a copy's rate: {how}", flush=True)
    return rows


# Blocks and stages of the backward kernel that gives dS itself, the likeliest first.
BACK = [(rows, columns, stages) for rows, columns in ((128, 64), (64, 64), (128, 32), (64, 32)) for stages in (3, 2)] + [(64, 64, 4)]


def to_come_back(given: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    """What the backward pass takes, g, u, Sg and Su as columns of one tensor, and the columns of another where its results go."""
    inside = stacked(given)
    widths = [inside[i].shape[1] for i in (0, 1, 2, 4)]
    dZ = torch.empty(len(inside[0]), inside[0].stride(0), device=DEVICE, dtype=inside[0].dtype)
    return (*given[:2], *inside), dict(zip(("dg", "du", "dSg", "dSu"), dZ[:, : sum(widths)].split(widths, 1), strict=True))


def backward(budget: float) -> list[dict[str, Any]]:
    """All gradients at once over blocks, stages and splits, beside the kernel that leaves dS to two products; it ends in time."""
    began, copy, rows = time.perf_counter(), copy_rate(), []
    print(f"a copy moves {copy:.2f} TB/s", flush=True)

    def left() -> bool:
        return time.perf_counter() - began < budget

    for rank in RANKS:
        hows = [dict(zip(("rows", "columns", "stages"), values, strict=True)) for values in BACK]
        small = made(528, 1040, rank)  # as in `tune`
        exact = tuple(t.double() if torch.is_tensor(t) else t for t in small)
        want = gated_backward_reference(*exact)[:5]
        want = (*want, want[0] @ exact[5], want[1] @ exact[7])
        *given, _, _, _ = to_come_back(small)[0]  # no c, and SiLU
        gated_backward_triton(*given)  # what Triton sets up once is there before threads come
        able = fitting(gated_backward_and_s, hows, tuple(given), want, left, f"rank {rank}")
        for shape in ("8B", "1B"):
            (*full, _, _, _), places = to_come_back(made(TOKENS, WIDTHS[shape], rank))
            (dg, du, dSg, dSu), Bg, Bu = places.values(), full[5], full[7]

            def products() -> None:
                torch.mm(dg, Bg, out=dSg)
                torch.mm(du, Bu, out=dSu)

            def apart() -> None:
                gated_backward_triton(*full, dg=dg, du=du)
                products()

            def once(how: dict[str, Any]) -> Callable[[], Any]:
                return lambda: gated_backward_and_s(*full, **places, **how)

            split = [how | {"splits": splits} for how in able for splits in (1, 2, 3, 4, 8)]
            tried = sorted(((milliseconds(once(how), 3, 4), how) for how in split if left()), key=lambda t: t[0])
            own, thin = milliseconds(apart), milliseconds(products)
            again = sorted(((milliseconds(once(how)), how) for _, how in tried[:8]), key=lambda t: t[0])  # luck does not come twice
            row: dict[str, Any] = {"shape": shape, "rank": rank, "apart_ms": own, "of_it_the_products_ms": thin}
            rows.append(row | {"copy_TB/s": copy, "tried": len(tried), "best": again})
            print(f"{shape}, rank {rank}: apart {own:.4f} ms, of it the products {thin:.4f}; {len(tried)} tried", flush=True)
            for ms, how in again[:6]:
                rate = 5 * full[0].nbytes / ms / 1e9 / copy
                print(f"  {ms:.4f} ms, {own - ms:+.4f} less, {rate:.2f} of a copy's rate: {how}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--seconds", type=float, help="100, and 150 with --backward")
    args = parser.parse_args()
    seconds = args.seconds or (150 if args.backward else 100)
    if args.tune:
        print(save("gated_tune", {"rows": tune(seconds)}, ("torch", "triton")))
    elif args.forward:
        print(save("gated_forward", {"tokens": TOKENS, "rows": forward(seconds)}, ("torch", "triton")))
    elif args.backward:
        print(save("gated_backward", {"tokens": TOKENS, "rows": backward(seconds)}, ("torch", "triton")))
    else:
        print(save("gated", {"tokens": TOKENS, "rows": rates()}, ("torch", "triton")))


if __name__ == "__main__":
    main()
