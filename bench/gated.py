"""The fused inside of gated MLPs: how near its two kernels come to the rate of a plain copy.

    python bench/gated.py            # bench/results/gated.json
    python bench/gated.py --tune     # blocks and splits for its kernels, each choice first held against the plain twin

Times are medians of CUDA-event timings, what is launched around a kernel (the sums of partial gradients) included. Bytes are the tensors
of the MLP's width that have to be moved, three forward and five back; the yardstick is a copy from device to device in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save

from weft.kernels.gated import gated_backward_reference, gated_reference
from weft.kernels.triton_gated import gated_backward_triton, gated_triton

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
    return *given[2:8], *given[9:]


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
        wants = (gated_reference(*inner(exact)),), gated_backward_reference(*exact)[:5]
        works: tuple[Callable[..., Any], ...] = (lambda *t, **how: (gated_triton(*t, **how),), gated_backward_triton)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=100)
    args = parser.parse_args()
    if args.tune:
        print(save("gated_tune", {"rows": tune(args.seconds)}, ("torch", "triton")))
    else:
        print(save("gated", {"tokens": TOKENS, "rows": rates()}, ("torch", "triton")))


if __name__ == "__main__":
    main()
