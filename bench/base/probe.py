"""Can an adapter of the base learn the demo's tasks? Plain torch, forward hooks: independent of weft, so that a failure of the base shows as one.

    python probe.py MODEL OUT.json [--tasks dates records style] [--workers 8] [--device cuda] [--steps 200] [--rows 16] [--methods r1 r8 full]

Per task and method every learning rate of the grid is run; exact match is what greedy decoding would give (every token of the answer is the most
likely one after the right tokens before it, which is the same thing).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

GRID = {"r1": [2e-3, 4e-3, 8e-3], "r8": [2e-3, 4e-3, 8e-3, 1.6e-2], "full": [2e-4, 6e-4, 1.8e-3]}


def load_demo():  # the file by itself: it needs the standard library only
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[2] / "src" / "weft" / "data" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


def encode(tokenizer, rows: list[dict]) -> list[tuple[list[int], int]]:
    """Of every row the ids and where the answer begins."""
    out = []
    for row in rows:
        before = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        out.append((tokenizer.apply_chat_template(row["messages"], return_dict=False), len(before)))
    return out


def pad(rows: list[tuple[list[int], int]], fill: int, device: str) -> tuple[Tensor, Tensor]:
    """ids (n, T), right-padded (causal attention never looks there), and targets (n, T), -100 outside the answers."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), fill)
    targets = torch.full((len(rows), width), -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, start - 1 : len(row) - 1] = torch.tensor(row[start:])
    return ids.to(device), targets.to(device)


def add_lora(model: nn.Module, rank: int, alpha: float = 16) -> list[nn.Parameter]:
    out = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            a = nn.Parameter(torch.empty(rank, layer.in_features, device=layer.weight.device))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            b = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
            layer.register_forward_hook(lambda _, x, y, a=a, b=b: y + (x[0] @ a.T) @ b.T * (alpha / rank))
            out += [a, b]
    return out


def answer_logits(model: nn.Module, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    keep = targets != -100
    return model.lm_head(model.model(ids, use_cache=False).last_hidden_state[keep]), targets[keep]


@torch.no_grad()
def score(model: nn.Module, rows: list[tuple[list[int], int]], fill: int, device: str) -> tuple[float, float]:
    """(loss a token, share of the rows answered exactly)"""
    total, n, right = 0.0, 0, 0
    for i in range(0, len(rows), 100):
        ids, targets = pad(rows[i : i + 100], fill, device)
        logits, wanted = answer_logits(model, ids, targets)
        total, n = total + F.cross_entropy(logits, wanted, reduction="sum").item(), n + len(wanted)
        wrong = torch.zeros_like(targets, dtype=torch.bool)
        wrong[targets != -100] = logits.argmax(-1) != wanted
        right += int((~wrong.any(1)).sum())
    return total / n, right / len(rows)


def run(job: dict) -> dict:
    device = job["device"]
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    began = time.time()
    demo = load_demo()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).to(device).requires_grad_(False)
    fill = tokenizer.pad_token_id
    train = encode(tokenizer, demo.generate(job["task"], "train", 4000, seed=0))
    held = encode(tokenizer, demo.generate(job["task"], "held_out", 300, seed=0))
    loaded = time.time()
    result = dict(job)
    if job["method"] == "base":
        loss, exact = score(model, held, fill, device)
        return result | {"held_out_loss": loss, "exact": exact}
    weights = list(model.requires_grad_(True).parameters()) if job["method"] == "full" else add_lora(model, int(job["method"][1:]))
    optimiser = torch.optim.AdamW(weights, lr=job["lr"], weight_decay=0.0)
    generator = torch.Generator().manual_seed(job["seed"])
    order: list[int] = []
    curve, tokens, losses = [], 0, []
    for step in range(job["steps"]):
        if len(order) < job["rows"]:
            order = torch.randperm(len(train), generator=generator).tolist()
        batch, order = [train[i] for i in order[: job["rows"]]], order[job["rows"] :]
        ids, targets = pad(batch, fill, device)
        logits, wanted = answer_logits(model, ids, targets)
        loss = F.cross_entropy(logits, wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        rate = min(1.0, (step + 1) / (0.06 * job["steps"])) * (0.5 + 0.5 * math.cos(math.pi * step / job["steps"]))
        for group in optimiser.param_groups:
            group["lr"] = job["lr"] * rate
        optimiser.step()
        optimiser.zero_grad()
        tokens += sum(len(r[0]) for r in batch)
        losses.append(loss.detach())
        if (step + 1) % (job["steps"] // 3) == 0 and step + 1 < job["steps"]:
            curve.append(round(score(model, held[:100], fill, device)[1], 3))
    trained = time.time()
    loss, exact = score(model, held, fill, device)
    return result | {"held_out_loss": loss, "exact": exact, "train_loss": torch.stack(losses[-20:]).mean().item(), "tokens": tokens, "curve": curve,
                     "parameters": sum(p.numel() for p in weights), "seconds": round(time.time() - began, 1), "training_seconds": round(trained - loaded, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="*", default=["dates", "records", "style"])
    parser.add_argument("--methods", nargs="*", default=["r1", "r8", "full"])
    parser.add_argument("--lr", type=float, nargs="*", help="instead of the grid")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common = {"model": args.model, "device": args.device, "threads": args.threads, "steps": args.steps, "rows": args.rows, "seed": args.seed}
    jobs = [common | {"task": t, "method": "base", "lr": 0.0} for t in args.tasks]
    jobs += [common | {"task": t, "method": m, "lr": lr} for m in args.methods for lr in args.lr or GRID[m] for t in args.tasks]
    if args.workers > 1:
        with torch.multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            results = list(pool.imap_unordered(run, jobs))
    else:
        results = list(map(run, jobs))
    results.sort(key=lambda r: (r["task"], r["method"], r["lr"]))
    for r in results:
        r.pop("model")
        print("  ".join(f"{k} {r[k]:.4g}" if isinstance(r[k], float) else f"{k} {r[k]}" for k in
                        ("task", "method", "lr", "exact", "held_out_loss", "train_loss", "curve", "tokens", "training_seconds", "seconds") if k in r), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
