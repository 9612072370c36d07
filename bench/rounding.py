"""Merging an adapter into nf4: what is kept of it, and what the merged model is worth, rounded to the nearest level and by chance.

    python bench/rounding.py            # bench/results/rounding.json; five minutes on a core

Weights: a 1024 × 1024 normal bf16 weight with an update of rank 16, ‖BA‖ / ‖W‖ from 0.3% to 10%. Model: the embedded base in nf4 and a LoRA
trained on it for a task of the demo; the loss is that of the task's held-out answers, in nats a token.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save

import weft
from weft.data import Batches, DataConfig, demo, load_rows, prepare
from weft.quant import quantise_, roundtrip
from weft.train import EvalConfig, Recipe, TrainConfig
from weft.train.evaluate import mean_loss

SEEDS = 3


def weights() -> list[dict[str, Any]]:
    rows = []
    torch.manual_seed(0)
    W = (torch.randn(1024, 1024) * 0.02).bfloat16().float()
    onto = {"source": W, "trained": roundtrip(W, "nf4")}
    update = torch.randn(1024, 16) @ torch.randn(16, 1024)
    for size in (0.003, 0.01, 0.03, 0.1):
        BA = update * (size * W.norm() / update.norm())
        for name, own in onto.items():
            for way in ("nearest", "stochastic"):
                found = roundtrip(own + BA, "nf4", rounding=way)
                left = found - (roundtrip(own, "nf4") if way == "nearest" else own)
                kept, off = (left * BA).sum() / BA.square().sum(), (found - own - BA).norm() / W.norm()
                rows.append({"change": size, "onto": name, "rounding": way, "kept": kept.item(), "error": off.item()})
                print(rows[-1], flush=True)
    return rows


def merged(task: str, folder: Path) -> list[dict[str, Any]]:
    train, held_out = demo.write(task, folder)
    tokenizer = weft.load_tokenizer("embedded")
    data = DataConfig(train=str(train), eval=str(held_out))
    asked = Batches(prepare(load_rows(held_out, "auto"), tokenizer, data, False).examples, 1024, False, 0).epoch(0)
    recipe = Recipe(
        name=task, method=weft.LoRA(rank=8, alpha=16), data=data, eval=EvalConfig(start=False, rows=10, train_rows=0),
        train=TrainConfig(lr=4e-3, steps=120, tokens=1024, progress="lines"), output=str(folder / task),
    )  # fmt: skip
    weft.fit(weft.load_base("embedded", base="nf4", device="cpu"), recipe, tokenizer=tokenizer)

    def after(onto: str, **options: Any) -> float:
        model = weft.load_base("embedded", base={"source": "fp32", "trained": "nf4"}[onto], device="cpu")
        model = weft.merge(weft.load(model.float(), folder / task), keep=False)
        if options:
            quantise_(model, "nf4", **options)
        return mean_loss(model, asked)

    bare = weft.load_base("embedded", base="nf4", device="cpu")
    rows = [{"what": "the base in nf4, no adapter", "loss": mean_loss(bare, asked)}]
    rows.append({"what": "the base in nf4 and the adapter", "loss": mean_loss(weft.load(bare, folder / task), asked)})
    for onto in ("source", "trained"):
        rows.append({"what": f"merged onto {onto}, fp32", "loss": after(onto)})
        rows.append({"what": f"merged onto {onto}, packed to the nearest", "loss": after(onto, rounding="nearest")})
        found = [after(onto, rounding="stochastic", seed=seed) for seed in range(SEEDS)]
        rows.append({"what": f"merged onto {onto}, packed by chance", "loss": statistics.mean(found), "of_seeds": found})
    for row in rows:
        print(task, row, flush=True)
    return [{"task": task} | row for row in rows]


def main() -> None:
    made = weights()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for task in ("dates", "records") for row in merged(task, Path(folder))]
    print(save("rounding", {"weights": made, "models": rows}))


if __name__ == "__main__":
    main()
