"""Several adapters trained at once on one base: a sweep over ranks, learning rates, methods or data for the price of one model.

Every run keeps what it has alone: its data and their order, optimiser, schedule, evaluations, checkpoints and metrics. Only the forward
and backward passes are shared: the rows of all runs lie in one batch, and each row goes through its own run's adapter. Adapters share no
parameter, so the gradient of the summed losses is each run's own gradient. The passes are those of `weft.step`, as in a run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

import weft.adapters
from weft.core import WeftError
from weft.data import Batch, join
from weft.methods.lora_init import ELSEWHERE
from weft.models import load_tokenizer
from weft.step import Fast, prepare
from weft.train import start
from weft.train.guard import Diverged, Interrupted, Signals
from weft.train.loop import update
from weft.train.output import Output
from weft.train.progress import Show
from weft.train.recipe import Recipe, checked
from weft.train.run import Event, Run
from weft.train.single import (
    Result,
    Rows,
    RunData,
    adapted,
    describe_plan,
    facts,
    figures,
    finish,
    on_card_of,
    read,
    with_threads,
)


def train_together(runs: Sequence[Run], fast: Fast, lost: dict[str, Diverged]) -> None:
    """Take every run's steps side by side until all are over. One that diverges goes into `lost`, by its name; the others go on."""
    for run in runs:
        run.start()
    while steps := [(run, group) for run in runs if run.recipe.name not in lost and (group := run.next_group())]:
        for run, _ in steps:
            run.pace.starts()
        targets = [sum(batch.n_targets for batch in group) for _, group in steps]
        losses = [torch.zeros((), device=run.device) for run, _ in steps]
        for micro in zip_longest(*(group for _, group in steps)):
            there = {i: batch for i, batch in enumerate(micro) if batch is not None}
            batch = join(list(there.values()), [steps[i][0].recipe.name for i in there]).to(runs[0].device)
            with fast.routed(batch):
                sums = fast.losses(batch, _counts(there.values()))
                parts = [loss / targets[i] for i, loss in zip(there, sums, strict=True)]
                torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
            for i, part in zip(there, parts, strict=True):
                losses[i] += part.detach()
            del sums, parts, part  # layers are captured as CUDA graphs where nothing is left of an earlier pass
        for (run, group), loss in zip(steps, losses, strict=True):
            try:
                update(run, group, loss)
                if run.over():
                    run.save()  # the others may take hours yet, and what stops them must not take this one along
            except Diverged as e:
                lost[run.recipe.name] = e


def _counts(batches: Iterable[Batch]) -> list[int]:
    """How the losses of joined batches are told apart: by their rows, or by their targets where they are packed."""
    return [b.input_ids.shape[0] if b.cu_seqlens is None else b.n_targets for b in batches]


def prepared(runs: Sequence[Run], tell: Callable[[Event], None]) -> Fast:
    """The fast path of a step of all runs, chosen and tried on a batch of each run's largest.

    Layers are compiled where batches are packed: those have one shape as long as the same runs go on. Padded ones differ in shape and in
    whose is which row, and would be compiled anew in step after step.
    """
    c, device = runs[0].config, runs[0].device
    packed = all(run.batches.packing for run in runs)
    wanted = device.type == "cuda" if c.compile is None else c.compile
    compiled = wanted and packed
    if wanted and not packed:
        what = "several adapters train on padded rows, in batches of ever new shapes: the layers are not compiled but run as they are"
        tell({"event": "note", "text": what, "warning": True})
    for run in runs:
        run.batches.even = compiled
    largest = [max(run.batches.epoch(0), key=lambda b: b.input_ids.numel()) for run in runs]
    batch = join(largest, [run.recipe.name for run in runs]).to(device)
    parameters = {f"{run.recipe.name}: {path}": p for run in runs for path, p in run.parameters.items()}
    runs[0].model.train()
    fast = prepare(
        runs[0].model, batch, parameters, memory=c.memory, compile=compiled, fp8=c.fp8, graphs=c.graphs,
        varying=not compiled, self_check=c.self_check, say=lambda text: tell({"event": "note", "text": text, "warning": True}),
    )  # fmt: skip
    for line in (fast.describe(), *fast.said):
        tell({"event": "note", "text": line})
    tell({"event": "prepared", "seconds": fast.compile_seconds})
    return fast


def run_recipes(
    recipes: Sequence[Recipe], *, resume: str = "auto", overwrite: bool = False, on_event: Callable[[Event], None] | None = None
) -> list[Result]:
    """Load the recipes' one base and `fit_together`: what `weft train` does with a recipe that has `runs`."""
    _alike([checked(r) for r in recipes])
    # A folder or rows that cannot be used are told before a large base is loaded; whether rows are packed is known when it is there.
    outputs = [Output(r, resume, overwrite, undecided=("data.packing",)) for r in recipes]
    rows = [read(r) for r in recipes]
    model = start.load(recipes, outputs)
    return _fit_together(model, recipes, rows, load_tokenizer(recipes[0].model), resume, overwrite, on_event)


def fit_together(
    model: nn.Module, recipes: Sequence[Recipe], *, tokenizer: Any = None, resume: str = "auto", overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> list[Result]:  # fmt: skip
    """Train several adapters at once, each as `weft.fit` would train it alone.

    They end with the same weights but for the rounding of sums, and for the masks of dropout, which are drawn for all rows together.
    Rows are packed where every adapter stands on linear layers alone (`weft.adapters.by_token`), as LoRA's usual targets do; if one does
    not, all are padded, as alone with `data.packing: false`.

    Args:
        recipes: one for each adapter, with names and outputs of their own and the same base and device.
        on_event: called with each run's events, which say the run's "name"; what is of all has the name "all runs".
        The rest is as for `weft.fit`.
    Raises:
        WeftError: recipes that cannot be used together, and all that `fit` raises. Diverged, when all others are finished, if one diverged.
        Interrupted: a checkpoint of every run was written.
    """
    _alike([checked(r) for r in recipes])
    return _fit_together(model, recipes, [None] * len(recipes), tokenizer, resume, overwrite, on_event)


def _fit_together(
    model: nn.Module, recipes: Sequence[Recipe], rows: Sequence[Rows | None], tokenizer: Any, resume: str, overwrite: bool,
    on_event: Callable[[Event], None] | None,
) -> list[Result]:  # fmt: skip
    first = recipes[0]
    tokenizer = load_tokenizer(first.model) if tokenizer is None else tokenizer
    if first.train.device not in ("auto", str(next(model.parameters()).device)):
        model.to(first.train.device)
    if not all(r.data.packing and _by_token(model, r) for r in recipes):  # padded rows are told apart by where they stand
        recipes = [replace(r, data=replace(r.data, packing=False)) for r in recipes]
    outputs = [Output(r, resume, overwrite) for r in recipes]
    lost: dict[str, Diverged] = {}
    results: list[Result] = []
    with with_threads(first.train.threads), on_card_of(model), Signals() as signals, ExitStack() as after:
        shows = [Show("off" if r.train.progress == "off" else "lines", name=r.name) for r in recipes]
        runs: list[Run] = []
        data: list[RunData] = []
        for recipe, output, show, given in zip(recipes, outputs, shows, rows, strict=True):
            data.append(RunData(model, recipe, tokenizer, given))
            if data[-1].warning:
                _teller(recipe.name, show, on_event)({"event": "note", "text": data[-1].warning, "warning": True})
            after.enter_context(adapted(model, recipe, data[-1].batches, output))
            run = Run(model, recipe, data[-1].batches, data[-1].evaluations, output, signals, _teller(recipe.name, show, on_event))
            after.callback(output.close)
            after.callback(run.close)
            runs.append(run)
        for run in sorted((r for r in runs if r.profile), key=lambda r: -r.steps)[1:]:
            run.profile = None  # a process has one profiler, and a step is that of all runs
        for run in runs:  # each adapted let its own adapter alone require gradients
            for p in run.parameters.values():
                p.requires_grad_(True)
        for run, output, d, show in zip(runs, outputs, data, shows, strict=True):
            run.resume(output.begin(facts(run, d)))
            show.text(f"{run.recipe.name}: {describe_plan(run)}")
            run.tell({"event": "start", "step": run.state.step, "steps": run.steps})
        shared = _teller("all runs", Show("off" if first.train.progress == "off" else "lines", name="all runs"), on_event)
        after.callback((fast := prepared(runs, shared)).close)
        found: list[tuple[Run, Output, tuple[Any, Any]]] = []
        try:
            train_together(runs, fast, lost)
            for run, output, d in zip(runs, outputs, data, strict=True):
                if run.recipe.name not in lost:
                    with weft.adapters.using(model, run.recipe.name):
                        found.append((run, output, figures(run, d, tokenizer)))
            results = [finish(run, output, *figured) for run, output, figured in found]  # all or none: a finished one is not gone on with
        except Interrupted as e:
            kept = [run for run in runs if run.state.step and run.recipe.name not in lost]
            for run in kept:
                run.save()
            told = "; ".join(f"{run.recipe.name} after step {run.state.step}: {run.saved}" for run in kept)
            raise Interrupted(f"{e}\nCheckpoints of all runs: {told}", e.checkpoint, e.code - 128) from None
    shows[0].table({result.adapter.name: _losses(result) for result in results})
    if lost:
        finished = ", ".join(str(r.adapter) for r in results) or "none"
        told = "\n  ".join(f"{name}: {e}" for name, e in lost.items())
        raise Diverged(f"{len(lost)} of {len(runs)} runs diverged; lower their train.lr. Finished: {finished}\n  {told}")
    return results


def _by_token(model: nn.Module, recipe: Recipe) -> bool:
    method: Any = recipe.method
    if getattr(method, "init", None) in ELSEWHERE:  # where it stands does not depend on how it starts
        method = replace(method, init="kaiming")
    return weft.adapters.by_token(model, method, recipe.name)


def _losses(result: Result) -> str:
    found = {"train loss": result.train_loss, "eval loss": result.eval_loss, "exact match": result.exact_match}
    return ", ".join([f"{what} {value:.4f}" for what, value in found.items() if value is not None] + [str(result.adapter)])


def _teller(name: str, show: Show, on_event: Callable[[Event], None] | None) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        show(event)
        if on_event is not None:
            on_event({"name": name, **event})

    return tell


def _alike(recipes: Sequence[Recipe]) -> None:
    """Raise WeftError unless these recipes can share a base and a process."""
    if not recipes:
        raise WeftError("there is no recipe to train")
    wrong = []
    for what, get in (
        ("model", lambda r: r.model), ("base", lambda r: r.base), ("train.device", lambda r: r.train.device),
        ("train.threads", lambda r: r.train.threads), ("train.memory", lambda r: r.train.memory), ("train.fp8", lambda r: r.train.fp8),
        ("train.compile", lambda r: r.train.compile), ("train.graphs", lambda r: r.train.graphs),
        ("train.self_check", lambda r: r.train.self_check),
    ):  # fmt: skip
        if len(found := dict.fromkeys(get(r) for r in recipes)) > 1:
            wrong.append(f"{what} must be one for all runs, not {', '.join(map(str, found))}")
    for what, get in (("name", lambda r: r.name), ("output", lambda r: r.output)):
        values = [get(r) for r in recipes]
        wrong += [f"{what}: {v!r} is that of {values.count(v)} runs" for v in dict.fromkeys(values) if values.count(v) > 1]
    if wrong:
        raise WeftError("these runs cannot be trained together:\n  " + "\n  ".join(wrong))
