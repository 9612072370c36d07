"""LoRA on fused experts: time and peak memory of one mixture's experts, in Qwen3-MoE's proportions: scaled down on a CPU with one thread,
whole on a card.

    python bench/experts.py             (about five minutes; --quick for one round of everything, to see that it runs; Linux only)
    python bench/experts.py --device cuda --base nf4 [--compiled]      (under a minute on an H100, two with compiling; no peft there)

Ways: the bare base; weft, expert by expert; weft's twin that forms W + s·BA of all experts; peft. The packed base also with all experts
decoded at once. Memory is the most that a process holds during a call less what it holds before, its allocator giving everything
back at once. Times are medians of rounds in which the ways take turns. On a card the ways are the frozen base, grouped products and all
updates formed, with the plain base in bf16 and the packed one; memory is what torch allocates and reserves at most during a call, less what
is allocated before; and each way's values and gradients are held against those of all updates formed, or all weights decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

import torch
import transformers
from _common import interleaved, save
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import weft
from weft.adapters import attached
from weft.methods import experts
from weft.methods.parameters import whole
from weft.quant import quantise_

EXPERTS, WIDTH, INSIDE, K, RANK = 64, 1024, 384, 8, 8
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
WAYS = {"fp32": ("base", "weft", "weft, all formed", "peft"), "nf4": ("base", "base, all decoded", "weft", "weft, all formed")}


class Holder(nn.Module):
    """Experts where a model would have them."""

    def __init__(self, base: str, experts: int = EXPERTS, width: int = WIDTH, inside: int = INSIDE) -> None:
        super().__init__()
        config = transformers.Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=inside, num_experts=experts)
        config._experts_implementation = "grouped_mm"  # transformers' own choice
        self.experts = Qwen3MoeExperts(config).requires_grad_(False)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.02)
        if base not in ("fp32", "bf16"):
            quantise_(self, base)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(*inputs)
        return y


def way(name: str, base: str) -> Callable[..., torch.Tensor]:
    model: Any = Holder(base)
    if name == "peft":
        import peft

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


def shown(rows: dict[str, Any], units: dict[str, str]) -> None:
    columns = list(next(iter(rows.values())))
    table = Table("", *(f"{c}, {unit}".lstrip(", ") for c in columns for unit in units))
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c][unit]:{form}}" for c in columns for unit, form in units.items()))
    Console(width=200).print(table)


def on_cpu(quick: bool) -> None:
    torch.set_num_threads(1)
    rows = measure("fp32", 1 if quick else 7) | measure("nf4", 1 if quick else 7)
    shown(rows, {"ms": ".3g", "MB": ".3g"})
    if not quick:
        what = f"{EXPERTS} experts of {WIDTH} × {INSIDE}, {K} for a token, rank {RANK}; numbers of tokens after the commas"
        print(save("experts", {"rows": rows, "base": what}))


CARD = {"experts": 128, "width": 2048, "inside": 768}  # a layer of Qwen3-30B-A3B
TOKENS = 4096


def ways_on_card(base: str, compiled: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """The ways of one base; they share its weights and its adapter."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = Holder(base, **CARD)
        torch.set_default_dtype(torch.float32)
    weft.adapt(model, weft.LoRA(rank=RANK, targets=(), target_parameters=tuple(BOTH)))
    adapter: Any = attached(model, "default")["experts"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    updates = {n: [u] for n, u in adapter.factors(model.experts).items()}

    def chosen(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        found = experts.way(model.experts, updates, x)
        if found is not experts.grouped:
            raise SystemExit(f"{base}: the grouped products were not chosen")
        y: torch.Tensor = model(x, *given)
        return y

    found = {
        "frozen base": model.experts.frozen,
        "frozen base, all decoded": lambda x, *given: model.experts.frozen(x, top_k_index=given[0], top_k_weights=given[1]),
        "all formed": lambda *given: whole(model.experts, [adapter], *given),
        "grouped": chosen,
    }
    if compiled:
        found["grouped, compiled"] = torch.compile(model._call_impl, dynamic=True)
        found["all formed, compiled"] = torch.compile(found["all formed"], dynamic=True)
    return {f"{base}: {name}": work for name, work in found.items()}


def on_card(base: str, compiled: bool, repeat: int) -> None:
    """Forward and backward of one layer."""
    chosen = torch.rand(TOKENS, CARD["experts"], device="cuda").topk(K).indices
    x, g = (torch.randn(TOKENS, CARD["width"], device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weights = torch.rand(TOKENS, K, device="cuda").softmax(-1).to(torch.bfloat16)
    rows: dict[str, Any] = {}
    for stored in ("bf16", base):
        ways = ways_on_card(stored, compiled)

        def step(name: str, ways: dict[str, Callable[..., torch.Tensor]] = ways) -> list[torch.Tensor]:
            leaf = x.clone().requires_grad_()
            y = ways[name](leaf, chosen, weights)
            y.backward(g)
            return [y.detach(), leaf.grad]  # type: ignore[list-item]

        exact, frozen = (step(f"{stored}: {twin}") for twin in ("all formed", "frozen base, all decoded"))
        for name in ways:
            step(name)  # warm
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = step(name)
            most, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - before
            want = frozen if "frozen base" in name else exact
            far = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, want, strict=True))
            rows[name] = {"": {"MB": most / 1e6, "MB reserved": reserved / 1e6, "off by": far}}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeat):
            for name in ways:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                step(name)
                stop.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(stop))
        for name, took in times.items():
            rows[name][""]["ms"] = statistics.median(took)
        del ways, step
        torch.cuda.empty_cache()
    shown(rows, {"ms": ".2f", "MB": ".0f", "MB reserved": ".0f", "off by": ".1e"})
    sizes = f"{CARD['experts']} experts of {CARD['width']} × {CARD['inside']}"
    what = f"{sizes}, {K} for a token, rank {RANK}; forward and backward of {TOKENS} tokens"
    print(save("experts_cuda", {"rows": {name: row[""] for name, row in rows.items()}, "base": what}))


if __name__ == "__main__":
    if "--memory" in sys.argv:
        print(json.dumps(memory(*sys.argv[2:4])))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        parser.add_argument("--base", default="nf4", help="how the packed base is stored (on a card)")
        parser.add_argument("--compiled", action="store_true", help="the compiled layer too (on a card)")
        args = parser.parse_args()
        if args.device == "cpu":
            on_cpu(args.quick)
        else:
            on_card(args.base, args.compiled, 3 if args.quick else 15)
