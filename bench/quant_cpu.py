"""On a CPU: a 4-bit linear layer's forward pass, and forward and backward, over those of fp32, weft beside bitsandbytes.

    python bench/quant_cpu.py [--width 2048] [--threads 1 2]

With several threads once more while another process wants one of the cores: many small parallel operations wait there, in
each of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import _common

from weft.quant import quantise_


def spin() -> None:
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """As many other processes as given want a core each meanwhile."""
    others = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    time.sleep(2 if others else 0)
    try:
        yield
    finally:
        for other in others:
            other.kill()


def layers(width: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Linear(width, width, bias=False).requires_grad_(False)
    ours = nn.Sequential(nn.Linear(width, width, bias=False).requires_grad_(False))
    ours.load_state_dict({"0.weight": plain.weight})
    quantise_(ours, "nf4")
    found: dict[str, nn.Module] = {"fp32": plain, "weft nf4": ours}
    try:
        import bitsandbytes

        how: dict[str, Any] = {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": True}
        theirs = bitsandbytes.nn.Linear4bit(width, width, bias=False, **how)
        theirs.load_state_dict({"weight": plain.weight})
        found["bitsandbytes nf4"] = theirs.to("cpu").requires_grad_(False)
    except ImportError:
        print("bitsandbytes is not installed: left out")
    return found


def measure(found: dict[str, nn.Module], width: int, repeat: int) -> Iterator[dict[str, Any]]:
    for tokens in (1, 32, 512):
        x = torch.randn(tokens, width)

        def forward(layer: nn.Module, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                layer(x)

        def both(layer: nn.Module, x: torch.Tensor = x) -> None:
            layer(x.clone().requires_grad_()).backward(torch.ones_like(x))

        for what, work in (("forward", forward), ("forward and backward", both)):
            seconds = _common.interleaved({n: (lambda w=work, m=m: w(m)) for n, m in found.items()}, repeat=repeat)
            over = {n: s / seconds["fp32"] for n, s in seconds.items()}
            yield {"tokens": tokens, "what": what, "milliseconds": {n: 1e3 * s for n, s in seconds.items()}, "over_fp32": over}
            print(tokens, what, {n: f"{1e3 * seconds[n]:.2f} ms, x{over[n]:.2f}" for n in found}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    found, cases = layers(args.width), []
    for threads in args.threads:
        for others in sorted({0, threads - 1}):
            print(f"threads: {threads}, other processes that want a core: {others}", flush=True)
            torch.set_num_threads(threads)
            with busy(others):
                rows = list(measure(found, args.width, args.repeat))
            cases.append({"threads": threads, "other_processes": others, "rows": rows})
    result = {"what": "one linear layer, fp32 activations", "width": args.width, "cases": cases}
    print(_common.save("quant_cpu", result, ("torch", "bitsandbytes")))


if __name__ == "__main__":
    main()
