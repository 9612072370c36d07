"""Eight adapters trained at once on one base, against eight runs one after another: time and peak memory, and the same adapters.

    python bench/together.py [--device cuda] [--adapters 8] [--steps 30]

Ranks and learning rates differ, the data is the same. Batches are small, as they are where one trains a small adapter: that is where
sharing pays, since a small batch does not fill the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save
from safetensors.torch import load_file

import weft
from weft.data import DataConfig, demo
from weft.train import EvalConfig, Recipe, TrainConfig


def recipes(data: Path, folder: Path, args: Any) -> list[Recipe]:
    return [
        Recipe(
            name=f"run{i}", method=weft.LoRA(rank=4 + 4 * (i % 4), alpha=16), data=DataConfig(train=str(data), packing=False),
            output=str(folder / f"run{i}"), seed=i, eval=EvalConfig(start=False, rows=0, train_rows=0),
            train=TrainConfig(
                lr=1e-3 * (1 + i), steps=args.steps, tokens=args.tokens, device=args.device, progress="off", save_seconds=None
            ),
        )
        for i in range(args.adapters)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    tokenizer = weft.load_tokenizer("embedded")
    result: dict[str, Any] = {"adapters": args.adapters, "steps": args.steps, "tokens": args.tokens}
    with tempfile.TemporaryDirectory() as temporary:
        data, _ = demo.write("dates", temporary, train=400, held_out=1)
        warm, folders = Path(temporary) / "warm", {k: Path(temporary) / k for k in ("together", "one_after_another")}
        model = weft.load_base("embedded", base="fp32", device=args.device)
        weft.fit_together(model, recipes(data, warm, args)[:2], tokenizer=tokenizer)
        for way, folder in folders.items():
            weft.remove(model)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            if way == "together":
                weft.fit_together(model, recipes(data, folder, args), tokenizer=tokenizer)
            else:
                for recipe in recipes(data, folder, args):
                    weft.fit(model, recipe, tokenizer=tokenizer)
                    weft.remove(model)
            result[way] = {"seconds": time.perf_counter() - start} | ({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {})
        apart = 0.0
        for i in range(args.adapters):
            a, b = (load_file(folder / f"run{i}" / "adapter_model.safetensors") for folder in folders.values())
            apart = max([apart, *(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)])
    result |= {"times_faster": result["one_after_another"]["seconds"] / result["together"]["seconds"], "weights_apart": apart}
    print(result)
    print(save("together" + ("_gpu" if cuda else ""), result))


if __name__ == "__main__":
    main()
