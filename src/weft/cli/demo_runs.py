"""The demo's training runs: one recipe for every row of its table, and the sweep that chose their learning rates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from weft.core import Method
from weft.data import DataConfig
from weft.data.demo import TASKS
from weft.methods import Full, LoRA
from weft.train import EvalConfig, Recipe, Result, TrainConfig, fit

SWEEP = Path(__file__).with_name("demo_sweep.json")  # made by bench/demo_sweep.py
STEPS, TOKENS, ALPHA = 120, 1024, 16.0
HELD_OUT = 200  # rows of the exact match
METHODS: dict[str, Method] = {f"LoRA r={r}": LoRA(rank=r, alpha=ALPHA) for r in (1, 2, 4, 8, 16)} | {"full fine-tuning": Full()}
GRID = {"LoRA": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "Full": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)}


@dataclass(frozen=True)
class Row:
    """One run's figures: losses in nats a token over 100 rows each, exact match over HELD_OUT held-out rows."""

    task: str
    method: str
    lr: float
    seed: int
    parameters: int
    seconds: float
    train_loss: float
    eval_loss: float
    exact_match: float
    adapter_bytes: int

    @staticmethod
    def of(result: Result, task: str, method: str, lr: float, seed: int) -> Row:
        assert result.train_loss is not None and result.eval_loss is not None and result.exact_match is not None
        return Row(task, method, lr, seed, result.parameters, result.seconds, result.train_loss, result.eval_loss, result.exact_match,
                   result.adapter_bytes)  # fmt: skip


def recipe(task: str, method: str, lr: float, data: Path, output: Path, seed: int = 0, name: str = "default") -> Recipe:
    """The same work for every method; only the method and its learning rate differ."""
    return Recipe(
        method=METHODS[method],
        data=DataConfig(train=str(data / f"{task}.train.jsonl"), eval=str(data / f"{task}.held_out.jsonl")),
        train=TrainConfig(lr=lr, steps=STEPS, tokens=TOKENS, eval_every=STEPS // 4, log_every=5, save_seconds=None, progress="off"),
        eval=EvalConfig(start=False, rows=100, train_rows=100, exact_match=True, exact_rows=HELD_OUT, batch=100,
                        max_new_tokens=TASKS[task].max_new_tokens),
        output=str(output), seed=seed, name=name,
    )  # fmt: skip


def best(sweep: dict[str, Any], task: str, method: str) -> dict[str, Any]:
    """The learning rate with the lowest mean held-out loss over the seeds, the figures there, and whether it lies inside the grid."""
    runs = [r for r in sweep["runs"] if r["task"] == task and r["method"] == method]
    rates = sorted({r["lr"] for r in runs})
    losses = {lr: mean(r["eval_loss"] for r in runs if r["lr"] == lr) for lr in rates}
    lr = min(losses, key=losses.__getitem__)
    there = [r for r in runs if r["lr"] == lr]
    match = [r["exact_match"] for r in there]
    return {
        "lr": lr, "interior": rates[0] < lr < rates[-1], "seeds": len(there), "parameters": there[0]["parameters"],
        "adapter_bytes": there[0]["adapter_bytes"], "train_loss": mean(r["train_loss"] for r in there), "eval_loss": losses[lr],
        "exact_match": mean(match), "spread": stdev(match) if len(match) > 1 else 0.0,
    }  # fmt: skip


def committed_sweep() -> dict[str, Any]:
    """The sweep that is in the package."""
    return json.loads(SWEEP.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def sweep(
    model: Any, tokenizer: Any, work: Iterable[tuple[str, str, float, int]], data: Path, output: Path, tell: Callable[[Row], None]
) -> list[dict[str, Any]]:
    """Run (task, method, learning rate, seed) one after another on one frozen base; the adapters are dropped."""
    import weft

    rows = []
    for task, method, lr, seed in work:
        result = fit(model, recipe(task, method, lr, data, output, seed), tokenizer=tokenizer, overwrite=True)
        weft.remove(model)
        row = Row.of(result, task, method, lr, seed)
        tell(row)
        rows.append(asdict(row))
    return rows


def work(tasks: Iterable[str], methods: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, str, float, int]]:
    """Every (task, method, learning rate, seed) of a sweep."""
    kind = {name: type(method).__name__ for name, method in METHODS.items()}
    return [(t, m, lr, s) for t in tasks for m in methods for lr in GRID[kind[m]] for s in seeds]
