"""LoRA on fused experts, on a CPU with one thread: time and peak memory of one mixture's experts in Qwen3-MoE's proportions, scaled down.

    python bench/experts.py             (about five minutes; --quick for one round of everything, to see that it runs; Linux only)

Ways: the bare base; weft, expert by expert; weft's twin that forms W + s·BA of all experts; peft. The packed base also with all experts
decoded at once. Memory is the most that a process holds during a call less what it holds before, its allocator giving everything
back at once. Times are medians of rounds in which the ways take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

import peft
import torch
import transformers
from _common import interleaved, save
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import weft
from weft.adapters import attached
from weft.methods.parameters import whole
from weft.quant import quantise_

EXPERTS, WIDTH, INSIDE, K, RANK = 64, 1024, 384, 8, 8
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
WAYS = {"fp32": ("base", "weft", "weft, all formed", "peft"), "nf4": ("base", "base, all decoded", "weft", "weft, all formed")}


class Holder(nn.Module):
    """Experts where a model would have them."""

    def __init__(self, base: str) -> None:
        super().__init__()
        config = transformers.Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=INSIDE, num_experts=EXPERTS)
        config._experts_implementation = "grouped_mm"  # transformers' own choice
        self.experts = Qwen3MoeExperts(config).requires_grad_(False)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.02)
        if base != "fp32":
            quantise_(self, base)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(*inputs)
        return y


def way(name: str, base: str) -> Callable[..., torch.Tensor]:
    model: Any = Holder(base)
    if name == "peft":
        config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=BOTH)
        return peft.get_peft_model(model, config)  # type: ignore[no-any-return]
    if name == "base":
        return model  # type: ignore[no-any-return]
    if name == "base, all decoded":  # as experts are that `routed` cannot compute, for instance in a call by keyword
        return lambda x, chosen, weights: model.experts(x, top_k_index=chosen, top_k_weights=weights)
    weft.adapt(model, weft.LoRA(rank=RANK, targets=(), target_parameters=tuple(BOTH)))
    adapter: Any = attached(model, "default")["experts"]
    return model if name == "weft" else lambda *given: whole(model.experts, [adapter], *given)


def held(peak: bool) -> int:
    """Bytes of this process's memory now, or at most since `forget`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM" if peak else "VmRSS"))
    return int(line.split()[1]) * 1024


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def works(compute: Callable[..., torch.Tensor]) -> dict[str, Callable[[], None]]:
    """What is measured, for 1 token and for 512."""
    found: dict[str, Callable[[], None]] = {}
    for tokens in (1, 512):
        torch.manual_seed(1)
        chosen = torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(tokens)])
        x, weights = torch.randn(tokens, WIDTH), torch.rand(tokens, K)

        def forward(x: torch.Tensor = x, chosen: torch.Tensor = chosen, weights: torch.Tensor = weights) -> None:
            with torch.no_grad():
                compute(x, chosen, weights)

        def step(x: torch.Tensor = x, chosen: torch.Tensor = chosen, weights: torch.Tensor = weights) -> None:
            compute(x.clone().requires_grad_(), chosen, weights).square().mean().backward()

        found |= {f"forward, {tokens}": forward, f"forward and backward, {tokens}": step}
    return found


def memory(name: str, base: str) -> dict[str, float]:
    """Megabytes of one way, in this process."""
    torch.set_num_threads(1)
    found = {}
    for what, work in works(way(name, base)).items():
        work()
        before = held(peak=False)
        forget()
        work()
        found[what] = (held(peak=True) - before) / 1e6
    return found


def measure(base: str, repeat: int) -> dict[str, Any]:
    """Milliseconds and megabytes of each way."""
    rows: dict[str, Any] = {}
    for name in WAYS[base]:
        words = [sys.executable, __file__, "--memory", name, base]
        small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | small)
        rows[name] = {what: {"MB": mb} for what, mb in json.loads(done.stdout.splitlines()[-1]).items()}
    ways = {name: works(way(name, base)) for name in WAYS[base]}
    for what in next(iter(ways.values())):
        for name, seconds in interleaved({name: w[what] for name, w in ways.items()}, repeat, 1).items():
            rows[name][what]["ms"] = 1e3 * seconds
    return {f"{base}: {name}": row for name, row in rows.items()}


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    rows = measure("fp32", 1 if quick else 7) | measure("nf4", 1 if quick else 7)
    columns = list(next(iter(rows.values())))
    table = Table("", *(f"{c}, {unit}" for c in columns for unit in ("ms", "MB")))
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c][unit]:.3g}" for c in columns for unit in ("ms", "MB")))
    Console(width=200).print(table)
    if not quick:
        what = f"{EXPERTS} experts of {WIDTH} × {INSIDE}, {K} for a token, rank {RANK}; numbers of tokens after the commas"
        print(save("experts", {"rows": rows, "base": what}))


if __name__ == "__main__":
    if "--memory" in sys.argv:
        print(json.dumps(memory(*sys.argv[2:4])))
    else:
        main("--quick" in sys.argv)
