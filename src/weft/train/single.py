"""`weft.fit` and `weft.train.run_recipe`: from a recipe to a saved adapter."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import weft.adapters
from weft.core import WeftError, base_class
from weft.data import Batch, Batches, Row, load_rows, prepare, split_rows
from weft.models import attention, load_tokenizer, room
from weft.train import start
from weft.train.evaluate import Match, check_lengths, exact_match
from weft.train.guard import Diverged, Signals
from weft.train.loop import train
from weft.train.output import Output
from weft.train.progress import Show, clock
from weft.train.recipe import Recipe, checked
from weft.train.run import Event, Run


@dataclass(frozen=True)
class Result:
    """What a run came to. Losses are nats a target token."""

    adapter: Path  # the folder that holds the adapter
    steps: int
    train_loss: float | None  # over a fixed part of the training rows, without dropout
    eval_loss: float | None
    exact_match: float | None  # share of answers that equal their reference
    seconds: float  # training and evaluation, over all parts of an interrupted run
    tokens: int  # input tokens seen
    tokens_per_s: float  # while training
    parameters: int  # trained
    adapter_bytes: int
    best_step: int | None  # the step whose adapter was taken, with train.patience
    stopped: str  # "end", or "patience"
    history: list[dict[str, Any]] = field(repr=False)  # the lines of metrics.jsonl
    answers: list[tuple[str, str, str]] = field(repr=False)  # prompt, reference, answer of the exact match


def run_recipe(recipe: Recipe, *, resume: str = "auto", overwrite: bool = False, on_event: Callable[[Event], None] | None = None) -> Result:
    """Load the recipe's base and tokenizer and `fit`: what `weft train` does."""
    checked(recipe)
    output = Output(recipe, resume, overwrite)  # a folder or rows that cannot be used are told before a large base is loaded
    rows = read(recipe)
    model = start.load([recipe], [output])
    return _fit(model, recipe, rows, load_tokenizer(recipe.model), resume, overwrite, on_event)


def fit(
    model: nn.Module, recipe: Recipe, *, tokenizer: Any = None, resume: str = "auto", overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Result:  # fmt: skip
    """Train an adapter on a model and save it to `recipe.output`.

    Args:
        model: a base, or a model that has an adapter named `recipe.name` already: then that one is trained on, as it is. The base's bytes
            do not change. Afterwards the trained adapter is on the model and works.
        recipe: everything else; `recipe.model` and `recipe.base` only name the model here.
        tokenizer: transformers' tokenizer; None: that of `recipe.model`.
        resume: "auto": go on with the unfinished run of the same recipe that `output` holds, bit for bit as if it had never stopped;
            "never": such a run is an error.
        overwrite: replace whatever run `output` holds.
        on_event: called with a dict whose "event" is "note" (a "text", and "warning": True where something went another way than asked),
            "start", "prepared" ("seconds" to compile and check the step), "at" (each step whose loss is known), "step" (each logged one),
            "eval", "save" or "end".

    Raises:
        WeftError: the recipe, the data or the output folder cannot be used; a layer never takes part; the disk is full.
        Diverged: (a WeftError) the loss or gradient is not finite, or stayed up after a spike; the last good checkpoint is named.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written and is named.
    """
    return _fit(model, checked(recipe), None, tokenizer, resume, overwrite, on_event)


def _fit(
    model: nn.Module, recipe: Recipe, rows: Rows | None, tokenizer: Any, resume: str, overwrite: bool,
    on_event: Callable[[Event], None] | None,
) -> Result:  # fmt: skip
    show = Show(recipe.train.progress)

    def tell(event: Event) -> None:
        show(event)
        if on_event is not None:
            on_event(event)

    output = Output(recipe, resume, overwrite)
    tokenizer = load_tokenizer(recipe.model) if tokenizer is None else tokenizer
    if recipe.train.device not in ("auto", str(next(model.parameters()).device)):
        model.to(recipe.train.device)
    with with_threads(recipe.train.threads), on_card_of(model), Signals() as signals:
        data = RunData(model, recipe, tokenizer, rows)
        show.text(data.report)
        if data.warning:
            tell({"event": "note", "text": data.warning, "warning": True})
        with adapted(model, recipe, data.batches, output):
            show.text(str(weft.adapters.summary(model)))
            run = Run(model, recipe, data.batches, data.evaluations, output, signals, tell)
            try:
                run.resume(output.begin(facts(run, data)))
                show.text(describe_plan(run))
                tell({"event": "start", "step": run.state.step, "steps": run.steps})
                train(run)
                show.text(run.pace.describe(run.speed(), run.fast.compile_seconds))
                result = finish(run, output, *figures(run, data, tokenizer))
            except Diverged as e:
                raise _advice(e, run) from e
            finally:
                tell({"event": "stop"}) if show.bar else None
                run.close()
                output.close()
    tell({"event": "end", **{k: getattr(result, k) for k in ("steps", "train_loss", "eval_loss", "exact_match", "seconds")}})
    show.table(_table(result))
    return result


Rows = tuple[list[Row], list[Row]]  # to train on, and held out


def read(recipe: Recipe) -> Rows:
    """A recipe's rows. WeftError: they cannot be used, or what it asks for needs held-out ones and there are none."""
    config = recipe.data
    rows, held = load_rows(config.train, config.format), list[Row]()
    if config.eval:
        held = load_rows(config.eval, config.format)
    elif config.eval_split:
        rows, held = split_rows(rows, config.eval_split, recipe.seed)
    for setting, wanted in (("eval.exact_match", recipe.eval.exact_match), ("train.patience", recipe.train.patience is not None)):
        if wanted and not held:
            raise WeftError(f"{setting} needs held-out rows: give data.eval (a file) or data.eval_split (a share of the training rows)")
    return rows, held


class RunData:
    """The recipe's rows as batches: for training, for the evaluation losses, and as rows for the exact match."""

    def __init__(self, model: nn.Module, recipe: Recipe, tokenizer: Any, given: Rows | None = None) -> None:
        config, limits = recipe.data, recipe.eval
        rows, held = read(recipe) if given is None else given
        packing = attention.use(model) and bool(config.packing)  # rows without padding need no mask either way
        shown = recipe.train.progress != "off"
        prepared = prepare(rows, tokenizer, config, shown, room(model))
        self.report = prepared.report
        examples = prepared.examples
        self.warning = check_lengths(model, examples, rows, recipe.train.tokens)
        self.batches = Batches(examples, recipe.train.tokens, packing, recipe.seed)
        self.held = spread(held, limits.exact_rows)
        self.evaluations: dict[str, Sequence[Batch]] = {}
        held_examples: list[Any] = []
        if held:
            held_examples = spread(prepare(held, tokenizer, config, shown, room(model)).examples, limits.rows)
            self.warning = self.warning or check_lengths(model, held_examples, held, recipe.train.tokens)
            self.evaluations["eval_loss"] = Batches(held_examples, recipe.train.tokens, packing, 0).epoch(0)
        if seen := spread(examples, limits.train_rows):
            self.evaluations["train_loss"] = Batches(seen, recipe.train.tokens, packing, 0).epoch(0)
        self.fingerprint = fingerprint(examples, held_examples)


def spread(items: Sequence[Any], most: int | None) -> list[Any]:
    """At most `most` of the items, evenly spaced over all of them."""
    if most is None or most >= len(items):
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def fingerprint(*sets: Sequence[Any]) -> str:
    """A hash of all tokens and of which bear loss, and the number of examples."""
    digest = hashlib.sha256()
    for examples in sets:
        for e in examples:
            digest.update(e.ids.tobytes() + e.bears.tobytes())
        digest.update(b"|")
    return f"{'+'.join(str(len(s)) for s in sets)} examples, sha256 {digest.hexdigest()[:16]}"


@contextmanager
def adapted(model: nn.Module, recipe: Recipe, batches: Batches, output: Output) -> Iterator[None]:
    """The adapter on the model and alone requiring gradients, for the length of the run; taken off again when the run fails."""
    new = recipe.name not in weft.adapters.names(model)
    before, training = weft.adapters.active(model), model.training
    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    if new:
        start.attach(model, recipe, batches, output)
    elif recipe.name not in before:
        weft.adapters.use(model, recipe.name)
    ours = {id(p) for p in weft.adapters.trainable(model, recipe.name).values()}
    needed = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in needed:
        p.requires_grad_(id(p) in ours)
    try:
        yield
    except BaseException:
        if new:
            weft.adapters.remove(model, recipe.name)
            weft.adapters.use(model, before)
        raise
    finally:
        for p, was in needed:
            p.requires_grad_(was)
        model.train(training)


@contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """torch's number of threads for the length of a with-block; None leaves it."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_card_of(model: nn.Module) -> AbstractContextManager[Any]:
    """The model's card as the current one for the length of a with-block: streams, events and what is read of memory are of that."""
    device = next(model.parameters()).device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def figures(run: Run, data: RunData, tokenizer: Any) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """The last adapter or the best one takes its place and answers: the run's final figures, and the answers of the exact match, if any."""
    recipe, state = run.recipe, run.state
    run.take_best()
    match: Match | None = None
    if recipe.eval.exact_match:
        e = recipe.eval
        match = run.last(lambda between: exact_match(run.model, tokenizer, data.held, e.max_new_tokens, e.batch, between, recipe.data))
    best = state.best if recipe.train.patience is not None else {}
    losses = best or state.last
    numbers: dict[str, Any] = {
        "steps": state.step, "best_step": int(best["step"]) if best else None, "stopped": "end" if state.step >= run.steps else "patience",
        "train_loss": losses.get("train_loss"), "eval_loss": losses.get("eval_loss"), "exact_match": match.share if match else None,
        "seconds": round(run.seconds(), 3), "tokens": state.tokens, "tokens_per_s": round(run.speed(), 1),
        "parameters": sum(p.numel() for p in run.parameters.values()),
    }  # fmt: skip
    return numbers, match.answers if match else []


def finish(run: Run, output: Output, numbers: dict[str, Any], answers: list[tuple[str, str, str]]) -> Result:
    """Save the adapter and mark the run as finished."""
    size = output.finish(run.adapter, numbers)
    return Result(adapter=output.folder, adapter_bytes=size, history=list(run.metrics.history), answers=answers, **numbers)


def _advice(e: Diverged, run: Run) -> Diverged:
    kept = f"The last good checkpoint is {run.saved}." if run.saved else "No checkpoint was due before that."
    return Diverged(
        f"{e}. {kept} Lower train.lr (it was {run.peak:g}), or raise train.warmup ({run.config.warmup:g}), and start again with another "
        "output or with --overwrite; look at the rows too: one wild row can do this."
    )


def describe_plan(run: Run) -> str:
    """What a run is about to do, for the user."""
    c, s = run.config, run.state
    epochs = f"{run.micro / max(len(run.batches), 1):.3g}"
    text = (
        f"{run.steps} step{'s' * (run.steps != 1)} ({epochs} epoch{'s' * (epochs != '1')} of {ceil(len(run.batches) / c.accumulate)}), "
        f"up to {c.tokens * c.accumulate:,} tokens a step, {c.schedule} learning rate with a peak of {run.peak:g}, on {run.device}\n"
        f"{run.batches.describe()}"
    )
    return f"{text}\ngoing on after step {s.step}, from {run.saved}" if run.saved else text


def facts(run: Run, data: RunData) -> dict[str, Any]:
    """What a run must find again to be resumed: base, data, device and seed."""
    ours = {id(p) for p in run.parameters.values()}
    sizes = [(p.numel(), p.dtype) for p in run.model.parameters() if id(p) not in ours]
    kinds = ", ".join(sorted({str(d).removeprefix("torch.") for _, d in sizes}))
    base = f"{run.recipe.model}: {base_class(run.model).__name__}, {sum(n for n, _ in sizes):,} parameters in {kinds}"
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"base": base, "data": data.fingerprint, "device": device, "seed": run.recipe.seed}


def _table(result: Result) -> dict[str, str]:
    measured = {
        what: format(value, form)
        for what, value, form in (
            ("train loss", result.train_loss, ".4f"), ("eval loss", result.eval_loss, ".4f"), ("exact match", result.exact_match, ".1%"),
        ) if value is not None
    }  # fmt: skip
    return {
        "steps": f"{result.steps}" + (f" (the adapter is that of step {result.best_step})" if result.best_step is not None else ""),
        **measured,
        "time": clock(result.seconds),
        "tokens/s": f"{result.tokens_per_s:,.0f}",
        "trained parameters": f"{result.parameters:,}",
        "adapter": f"{result.adapter} ({result.adapter_bytes:,} bytes)",
    }
