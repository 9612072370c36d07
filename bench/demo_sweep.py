"""The sweep behind the demo's learning rates: every method of its table, a grid of rates, three seeds.

    python bench/demo_sweep.py [--device cuda] [--processes 8] [--seeds 3]

Writes src/weft/cli/demo_sweep.json, which the package ships: the demo takes each method's best rate from it and shows the rows that it
does not run live. Says so where a best rate lies at the edge of its grid. One seed took 19 minutes with two processes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _common


def jobs(seeds: list[int]) -> list[tuple[str, str, float, int]]:
    from weft.cli.demo_runs import METHODS, TASKS, work

    first, *others = TASKS
    return work([first], METHODS, seeds) + work(others, ["LoRA r=8"], seeds)


def worker(part: list[tuple[str, str, float, int]], device: str, data: str, queue: Any) -> None:
    import torch

    from weft.cli.demo_runs import sweep
    from weft.models import load_base, load_tokenizer

    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_base("embedded", base="fp32", device=device), load_tokenizer("embedded")
        sweep(model, tokenizer, part, Path(data), Path(folder) / "run", lambda row: queue.put(row.__dict__))
    queue.put(None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1e9, help="stop after so many seconds and keep what there is")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    from weft.cli.demo_runs import STEPS, SWEEP, TASKS, TOKENS, best
    from weft.data.demo import write

    seeds = list(range(args.seeds))
    todo, began = jobs(seeds), time.time()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as data:
        for task in TASKS:
            write(task, data)
        queue = context.Queue()
        parts = [todo[i :: args.processes] for i in range(args.processes)]
        processes = [context.Process(target=worker, args=(part, args.device, data, queue)) for part in parts]
        for p in processes:
            p.start()
        runs, left = [], len(processes)
        while left and time.time() - began < args.limit and any(p.is_alive() for p in processes):
            try:
                row = queue.get(timeout=5)
            except Exception:
                continue
            left -= row is None
            if row is not None:
                runs.append(row)
                print(f"{len(runs)}/{len(todo)} {time.time() - began:5.0f} s  {row['task']} {row['method']:16} lr {row['lr']:.3g}"
                      f" seed {row['seed']}  eval loss {row['eval_loss']:.4f}  exact {row['exact_match']:.3f}", flush=True)  # fmt: skip
        for p in processes:
            p.terminate()
    runs.sort(key=lambda r: (r["task"], r["method"], r["lr"], r["seed"]))
    os.environ.setdefault("OUT", str(SWEEP.parent))
    setup = {"steps": STEPS, "tokens_a_step": TOKENS, "seeds": seeds, "device": args.device, "base": "embedded, fp32"}
    path = _common.save("demo_sweep", {"setup": setup, "complete": len(runs) == len(todo), "runs": runs})
    sweep = json.loads(path.read_text())
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in runs):
        b = best(sweep, task, method)
        edge = "" if b["interior"] else "AT THE EDGE OF THE GRID"
        print(f"{task:8} {method:16} best lr {b['lr']:.3g} {edge} eval loss {b['eval_loss']:.4f} "
              f"exact match {b['exact_match']:.3f} ± {b['spread']:.3f} ({b['seeds']} seeds)")  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
