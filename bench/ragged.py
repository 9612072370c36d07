"""Attention over packed rows, way by way: what FlashAttention 2 costs today, and what cuDNN would.

    python bench/ragged.py                        # bench/results/ragged.json; some three minutes on an H100
    python bench/ragged.py --ways varlen aten     # some of the ways
    python bench/ragged.py --flex                 # FlexAttention too, which compiles
    python bench/ragged.py --device cpu --tokens 256 --heads 4,2,16      # the script itself, without a card

Causal attention in bf16 over --tokens tokens of one sequence, in which rows lie end to end and do not see each other. The ways:

varlen    `torch.nn.attention.varlen`, FlashAttention 2: what `weft.models.attention.varlen` does today.
aten      `torch.ops.aten._cudnn_attention_forward` and `_backward` with the rows' ends: cuDNN's ragged layout as torch has it.
          q (T, H, D), k and v (T, Hkv, D) as they lie, grouped heads without copies, the mask causal from the top left, which is right
          as q and k have the same rows. Torch up to 2.11 at least looks among kept plans and keeps none (pytorch/pytorch#191576):
          it builds a plan in EVERY call.
frontend  The same layout by NVIDIA's own Python package, with plans that are kept: one for each (rows, longest), both rounded up to a
          power of two; rows that are not there have length 0. No dependency of weft, and it uses the cuDNN that torch brought:
          pip install --no-deps --target build/frontend nvidia-cudnn-frontend==1.18.0 (2 MB), and this script looks there.
exact     "frontend" with a plan for the exact number of rows and the exact longest: what rounding up costs.
padded    `weft.models.attention.padded` by cuDNN: blocks of rows of like length, gathering and scattering included.
dense     For rows of one length, a (rows, H, length, D) call of cuDNN, nothing gathered: the upper bound.
flex      FlexAttention with a block mask of rows.

Per packing, in ms:
first     forward and backward for the first time, wall clock: plans are built, kernels loaded
forward, both                      one call between two CUDA events; launches are in it where they take longer than the kernels
kernels_forward, kernels_both      the sum of the kernels' own times in a profile: what counts when the host is ahead
and the six longest kernels of "both"; TFLOP/s of "both" by kernels (causal, 3.5 times the forward's work); GB above what was there; the
relative distances ‖a - b‖/‖b‖ to fp64 of the output and the three gradients (a NaN is "Infinity").

new_lengths   batches of as many tokens in as many rows of other lengths, one after another, as training brings them: the first call of each
              beside the second (forward and backward, wall clock). A way whose first calls stay at tens of ms builds plans in every batch.
again         "padded" and "dense" in a process with TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1, which rounds lengths up in the key of dense plans
              (ragged_again.json).
graphs        a forward and backward pass captured once, and replayed with other lengths: distances to fp64 (the largest of four), and ms.

Results are saved after every case. What fails is printed and kept as the case's "error"; if the device is of no use afterwards, a new
process goes over everything without that way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "build" / "frontend")]

import torch
from _common import save
from _ragged import made, reference
from torch import Tensor

WAYS = ("varlen", "padded", "dense", "exact", "frontend", "aten")
AGAIN = {"TORCH_CUDNN_SDPA_AVOID_RECOMPILE": "1"}


# -------------------------------------------------------------------------------------------------------------- packings


def mix(tokens: int, seed: int) -> list[int]:
    """Lengths of rows, log-uniform between 64 and 4096; the last is cut off at `tokens`."""
    chance, lengths = random.Random(seed), []
    while sum(lengths) < tokens:
        lengths.append(min(int(64 * 64 ** chance.random()), tokens - sum(lengths)))
    return lengths


def of_as_many(tokens: int, rows: int, seed: int) -> list[int]:
    """Lengths of that many rows that sum to `tokens`, log-uniform over a range of 1 : 32."""
    chance = random.Random(seed)
    weights = [32 ** chance.random() for _ in range(rows)]
    lengths = [max(1, int(w / sum(weights) * tokens)) for w in weights]
    lengths[lengths.index(max(lengths))] += tokens - sum(lengths)
    return lengths


def packings(tokens: int) -> dict[str, list[int]]:
    made = {f"{n} x {tokens // n}": [tokens // n] * n for n in (1, 4, 16, 64) if tokens % n == 0}
    return made | {"mix": mix(tokens, 1)}


def ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


# ---------------------------------------------------------------------------------------------------------------- timing


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def answers(device: torch.device) -> bool:
    """Whether the device can still be used: an illegal access leaves it of no use to the whole process."""
    try:
        synchronise(device)
    except Exception:
        return False
    return True


def wall(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call on a host that waits for it."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return 1000 * (time.perf_counter() - start)


def timed(work: Callable[[], Any], device: torch.device, most: int = 25, seconds: float = 0.6) -> float:
    """Median milliseconds of one call between two events; at most that many calls and that long."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < most and time.perf_counter() - began < seconds):
        if device.type != "cuda":
            times.append(wall(work, device))
            continue
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def kernels(work: Callable[[], Any], calls: int = 5) -> tuple[float, dict[str, float]]:
    """Milliseconds of all kernels of one call, and of the six that take longest, from a profile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
    found = {e.key: e.self_device_time_total / calls / 1000 for e in profile.key_averages() if e.self_device_time_total > 0}
    longest = sorted(found.items(), key=lambda pair: -pair[1])[:6]
    return sum(found.values()), {name[:90]: round(ms, 4) for name, ms in longest}


def distance(a: Tensor, b: Tensor) -> float:
    found = ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()
    return found if found == found else float("inf")


# ----------------------------------------------------------------------------------------------------------------- parts


def operands(tokens: int, heads: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    many, groups, width = heads
    leaves = [torch.randn(tokens, n, width, device=device).to(dtype).requires_grad_() for n in (many, groups, groups)]
    return leaves, torch.randn(tokens, many, width, device=device).to(dtype)


def case(way: str, lengths: Sequence[int], leaves: list[Tensor], grad: Tensor, want: Sequence[Tensor]) -> dict[str, Any]:
    device = grad.device
    attend = made(way, lengths, ends(lengths, device))
    both = lambda: torch.autograd.grad(attend(*leaves), leaves, grad)  # noqa: E731
    found: dict[str, Any] = {"first": wall(both, device)}
    out = attend(*leaves)
    got = (out, *torch.autograd.grad(out, leaves, grad))
    found |= {f"off_{name}": distance(a.detach(), b) for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True)}
    del out, got
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        there = torch.cuda.memory_allocated()
        both()
        torch.cuda.synchronize()
        found["GB"] = (torch.cuda.max_memory_allocated() - there) / 1e9
    found["forward"], found["both"] = timed(lambda: attend(*leaves), device), timed(both, device)
    if device.type == "cuda":
        found["kernels_forward"], _ = kernels(lambda: attend(*leaves))
        found["kernels_both"], found["longest"] = kernels(both)
        work = 3.5 * 2 * sum(n * n for n in lengths) * grad.shape[1] * grad.shape[2]
        found["TFLOP/s"] = work / (found["kernels_both"] or found["both"]) / 1e9
    return found


def new_lengths(way: str, leaves: list[Tensor], grad: Tensor, rows: int, batches: int = 6) -> dict[str, Any]:
    found: dict[str, list[Any]] = {"longest": [], "first": [], "second": []}
    for seed in range(batches):
        lengths = of_as_many(len(grad), rows, seed)
        attend = made(way, lengths, ends(lengths, grad.device))
        both = lambda: torch.autograd.grad(attend(*leaves), leaves, grad)  # noqa: E731
        found["longest"].append(max(lengths))
        for name in ("first", "second"):
            found[name].append(round(wall(both, grad.device), 2))
    return found


def in_graphs(way: str, leaves: list[Tensor], grad: Tensor, rows: int) -> dict[str, Any]:
    """Captured with one batch's rows, replayed with another's, whose ends are copied to where the first one's were."""
    one, two = (of_as_many(len(grad), rows, seed) for seed in (0, 1))
    cu = ends(one, grad.device)
    attend = made(way, max(one, two, key=max), cu, in_graph=True)

    def both() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            both()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        held = both()
    found: dict[str, Any] = {}
    for name, lengths in (("off_as_captured", one), ("off_other_lengths", two)):
        cu.copy_(ends(lengths, grad.device))
        for t in held:
            t.zero_()
        graph.replay()
        found[name] = max(distance(a, b) for a, b in zip(held, reference(*leaves, lengths, grad), strict=True))
    return found | {"replay": timed(graph.replay, grad.device)}


def main() -> None:
    parse = argparse.ArgumentParser()
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--tokens", type=int, default=8192)
    parse.add_argument("--heads", nargs="+", default=["32,8,128", "32,8,64"], help="heads, heads of k and v, width: 8B's and 1B's")
    parse.add_argument("--ways", nargs="+", default=list(WAYS))
    parse.add_argument("--parts", nargs="+", default=["speed", "new_lengths", "graphs", "again"])
    parse.add_argument("--flex", action="store_true")
    parse.add_argument("--name", default="ragged")
    given = parse.parse_args()
    device, dtype = torch.device(given.device), torch.bfloat16 if given.device == "cuda" else torch.float32
    ways = [*given.ways, *(["flex"] if given.flex else [])]
    settings = {"cudnn": torch.backends.cudnn.version(), "avoid_recompile": os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE")}
    result: dict[str, Any] = {"tokens": given.tokens, "dtype": str(dtype), **settings, "cases": []}
    if find_spec("cudnn") is None:
        print('"frontend" and "exact" need: pip install --no-deps --target build/frontend nvidia-cudnn-frontend==1.18.0', flush=True)
    packages = ("torch", "transformers", "nvidia-cudnn-cu13", "nvidia-cudnn-frontend", "triton")

    def note(part: str, what: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        try:
            found = work()
        except Exception as error:  # what one case meets is a finding, and the others are still to be seen
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
        usable = "error" not in found or answers(device)
        result["cases"].append({"part": part, **what, **found})
        short = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in found.items() if k != "longest" or part != "speed"}
        print(part, *what.values(), json.dumps(short), flush=True)
        save(given.name, result, packages)
        if not usable:
            others = [w for w in given.ways if w != what.get("way")]
            print(f"the device does not answer any more; without {what.get('way')} once more, in {given.name}_rest.json", flush=True)
            command = [sys.executable, __file__, "--tokens", str(given.tokens), "--heads", *given.heads, "--parts", *given.parts]
            raise SystemExit(subprocess.run([*command, "--ways", *others, "--name", given.name + "_rest"]).returncode if others else 1)

    for written in given.heads:
        heads = [int(n) for n in written.split(",")]
        leaves, grad = operands(given.tokens, heads, device, dtype)
        for name, lengths in packings(given.tokens).items() if "speed" in given.parts else ():
            print(f"\n{written}, {name}: {lengths if name == 'mix' else ''}", flush=True)
            want = reference(*leaves, lengths, grad)
            for way in ways:
                if way != "dense" or len(set(lengths)) == 1:
                    note("speed", {"heads": written, "rows": name, "way": way}, lambda: case(way, lengths, leaves, grad, want))
    first = given.heads[0]
    leaves, grad = operands(given.tokens, [int(n) for n in first.split(",")], device, dtype)
    for way in ways if "new_lengths" in given.parts else ():
        if way in ("varlen", "frontend", "padded", "aten"):
            note("new_lengths", {"heads": first, "rows": "13", "way": way}, lambda: new_lengths(way, leaves, grad, 13))
    if "again" in given.parts:
        command = [sys.executable, __file__, "--device", given.device, "--tokens", str(given.tokens), "--heads", first]
        command += ["--ways", "padded", "dense", "--parts", "speed", "new_lengths", "--name", given.name + "_again"]
        print("\nonce more with", AGAIN, flush=True)
        note("again", {}, lambda: {"exit_code": subprocess.run(command, env=os.environ | AGAIN, timeout=300).returncode})
    for way in ways if "graphs" in given.parts and device.type == "cuda" else ():  # last: a failed capture may leave the device unusable
        if way in ("varlen", "frontend", "aten"):
            note("graphs", {"heads": first, "rows": "13", "way": way}, lambda: in_graphs(way, leaves, grad, 13))
    print(save(given.name, result, packages))


if __name__ == "__main__":
    main()
