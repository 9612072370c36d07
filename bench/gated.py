"""The fused inside of gated MLPs: how near its two kernels come to the rate of a plain copy.

    python bench/gated.py            # bench/results/gated.json
    python bench/gated.py --tune     # the constants of the kernels, each choice first held against the plain twin

Times are medians of CUDA-event timings, what is launched around a kernel (the sums of partial gradients) included. Bytes are the tensors
of the MLP's width that have to be moved, three forward and five back; the yardstick is a copy from device to device in the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from _common import save
from _gated_trials import backward, candidates, forward

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
    """The best of all candidates for each width and rank, and the best of each variant; nothing new is begun after `budget` seconds."""
    began, copy, rows = time.perf_counter(), copy_rate(), []
    print(f"a copy moves {copy:.2f} TB/s")
    for rank in RANKS:
        small = made(528, 1040, rank)  # blocks that are cut off both ways, and divisible by 16 as the real ones are, so compiled alike
        exact = gated_reference(*(t.double() if torch.is_tensor(t) else t for t in inner(small)))
        dback = gated_backward_reference(*(t.double() if torch.is_tensor(t) else t for t in small))
        dback = (*dback[:5], dback[0] @ small[5].double(), dback[1] @ small[7].double())
        tried = candidates(rank)
        with ThreadPoolExecutor(16) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for name, how, splits in tried:
                work, args = (forward, inner(small)) if name.startswith("fwd") else (backward, small)
                work(name, how | {"splits": splits[0]}, args, warm=True)
        print(f"rank {rank}: {len(tried)} compiled, {time.perf_counter() - began:.0f} s", flush=True)
        able, failed = [], []
        for name, how, splits in tried:
            back = not name.startswith("fwd")
            work, args = (backward, small) if back else (forward, inner(small))
            try:
                found = work(name, how | {"splits": splits[0]}, args)
                worst = max(map(distance, (*found[:5], *found[7:]), dback)) if back else distance(found, exact)
                torch.cuda.synchronize()
            except Exception as e:
                failed.append((name, how, f"{type(e).__name__}: {e}"[:150]))
                continue
            if worst <= 1e-2:
                able.append((name, how, splits))
            else:
                failed.append((name, how, f"off by {worst:.1e}"))
        for f in failed:
            print("  not usable:", *f)
        for shape, width in WIDTHS.items():
            given = made(TOKENS, width, rank)
            few = {"forward": [], "backward": []}  # type: dict[str, list[Any]]
            few["forward"].append((milliseconds(lambda: gated_triton(*inner(given))), "as landed", {}))
            few["backward"].append((milliseconds(lambda: gated_backward_triton(*given)), "as landed", {}))
            for name, how, splits in able:
                if time.perf_counter() - began > budget:
                    print("  out of time")
                    break
                back = not name.startswith("fwd")
                for s in splits:
                    full, args = how | {"splits": s}, given if back else inner(given)
                    work = backward if back else forward
                    few["backward" if back else "forward"].append((milliseconds(lambda: work(name, full, args), 3, 4), name, full))
            dg, Bg = given[0], given[5]
            thin = milliseconds(lambda: (dg @ Bg, dg @ Bg))
            print(f"{shape} {width}, rank {rank}: the two thin products that bwd_sums spares take {thin:.3f} ms")
            for way, passes in (("forward", 3), ("backward", 5)):
                order = sorted(few[way], key=lambda f: f[0])
                best = {name: next(f for f in order if f[1] == name) for name in {f[1] for f in order}}
                shown = order[:5] + [f for f in best.values() if f not in order[:5]]
                for ms, name, full in shown:
                    rate = passes * given[0].nbytes / ms / 1e9
                    print(f"  {way} {ms:.3f} ms {rate:.2f} TB/s {rate / copy:.2f} of a copy: {name} {full}", flush=True)
                rows.append({"shape": shape, "width": width, "rank": rank, "way": way, "thin_ms": thin, "copy_TB/s": copy, "tried": order})
    print(f"{time.perf_counter() - began:.0f} s")
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
