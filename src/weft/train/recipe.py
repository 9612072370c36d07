"""A recipe: everything that decides a training run, as one tree of dataclasses.

The YAML file, the flags of `weft train` and the reference page are all derived from this tree, so a setting exists once; the docstring
under a field is its help text. `reading.py` reads and writes recipes, and finds what is wrong with one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from weft.core import Method, WeftError, amount, device_of
from weft.data import DataConfig
from weft.methods import LoRA
from weft.quant import FORMATS, parse_base


@dataclass
class TrainConfig:
    """How the adapter is trained: optimiser, schedule, batch, and when to evaluate, save and stop."""

    lr: float | None = None
    """Peak learning rate. Null takes the method's own default (LoRA 2e-4, Full 2e-5: the optimum of LoRA lies about ten times higher,
    nearly whatever the rank). It is the setting most worth sweeping."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up: half a cosine, a straight line down, or no decay."""
    warmup: float = 0.05
    """Warm-up from zero to `lr`: below 1 a share of all steps, from 1 on a number of steps. Adam's second moment is unreliable in the first
    steps, so some warm-up always pays."""
    lr_end: float = 0.0
    """Where cosine and linear end, as a share of `lr`."""
    epochs: float = 1.0
    """Times that every row is seen. Ignored when `steps` is given."""
    steps: int | None = None
    """Optimiser steps. Null: as many as `epochs` needs."""
    tokens: int = 4096
    """Token budget of one micro-batch: what is in memory at once, padding included. LoRA loses more than full fine-tuning from large
    batches, so raise it for speed, not for quality."""
    accumulate: int = 1
    """Micro-batches per optimiser step. Their losses are summed and divided by all target tokens, which equals one big batch."""
    optimiser: Literal["adamw", "adamw-8bit", "adamw-offload", "adamw-paged"] = "adamw"
    """Where AdamW's two moments lie: fp32 on the device (8 bytes a trained parameter), 8 bits on the device (2 bytes), fp32 in the host's
    memory (the same bits as "adamw", slower), or bitsandbytes' paged memory. The adapter's moments are small: of an 8B model at rank 16
    they are 0.34 GB."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's term against division by zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, per step and unit of learning rate. It pulls the adapter to zero, that is, to the base."""
    clip: float = 1.0
    """Largest norm of the gradient over all adapter parameters; longer ones are shortened to it. 0: no clipping."""
    eval_every: int | None = None
    """Steps between evaluations. Null: ten a run. 0: only before and after training."""
    save_every: int | None = None
    """Steps between checkpoints. Null: by time only."""
    save_seconds: float | None = 300.0
    """Seconds between checkpoints. Null: by steps only."""
    keep: int = 2
    """Newest checkpoints kept; the best one is kept besides when `patience` is given."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a lower evaluation loss, and take the adapter of the best one. Null: train to the
    end and take the last."""
    spike: float = 3.0
    """Stop when the loss stays above this many times its running median (and 1 nat above it) for `spike_steps` steps. 0: never. A loss or
    gradient that is not finite always stops the run."""
    spike_steps: int = 10
    """Successive steps that make a spike."""
    memory: float | str = "auto"
    """What the activations may take: "auto" spends what the card has free; a share of them from 0 (least memory, each layer computed
    again in the backward pass) by 0.5 (from there on some layers' wait in the host's memory) to 1 (most speed); or what the process may
    take on the card: bytes, or "40GB"."""
    compile: bool | None = None
    """Compile the repeated layers. Null: on CUDA, where it takes some ten seconds once."""
    graphs: bool | None = None
    """Launch all compiled layers at once, as CUDA graphs: small models otherwise wait for the host. Their memory stays reserved between
    steps. Null: where layers are small enough to wait, that leaves as much of the card free again, and `memory` is no number of bytes.
    True: also where not."""
    fp8: bool | None = None
    """Multiply in fp8, forward and backward, in the frozen layers of an fp8 base (`base: fp8`) on a card that has such units. The
    self-check holds each product against the plain one, and layers that are too far off decode. Null: yes, if there is a self-check."""
    self_check: bool = True
    """Before the first step one micro-batch goes through the fast path and through the plain one; where they differ, the plain one is used
    and that is said."""
    profile: bool = False
    """Write `<output>/profile/trace.json` (for chrome://tracing) and a table of where the time of three steps went."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    device: str = "auto"
    """"auto" (cuda when there is one), "cpu", "cuda" or "cuda:1"."""
    threads: int | None = None
    """CPU threads. Null: torch's own number; a resumed run takes the number it started with, since sums depend on it in the last bit."""
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    """What is shown while training: a bar on a terminal and plain lines elsewhere ("auto"), or one of the three."""
    tensorboard: Literal["auto", "on", "off"] = "off"
    """Write TensorBoard files to `<output>/tensorboard`; "auto": when tensorboard is installed."""


@dataclass
class EvalConfig:
    """What is measured on held-out rows, and on as many of the training rows."""

    start: bool = True
    """Evaluate once before the first step: the bare base's figures."""
    rows: int | None = 500
    """Rows (at most) of the evaluation data that its loss is taken over. Null: all."""
    train_rows: int | None = 100
    """Rows (at most) of the training data whose loss is taken likewise; the gap to the evaluation loss is the overfitting. 0: none."""
    exact_match: bool = False
    """After training, let the model answer held-out prompts (greedy) and count the answers that equal the reference, outer space aside."""
    exact_rows: int | None = 200
    """Rows (at most) that are answered for the exact match. Null: all."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    batch: int = 32
    """Prompts answered at once."""


@dataclass(kw_only=True)
class Recipe:
    """Everything that decides a training run. Only `data.train` must be given."""

    data: DataConfig
    """Where the rows come from and how they become tokens."""
    model: str = "embedded"
    """The base model: "embedded", a folder, or a hub id."""
    base: str = "auto"
    """How the frozen base is stored: fp32, bf16, fp16; nf4, fp4, int8 or fp8, packed while it loads, with options as in
    nf4:block=128,nested=false. "auto": as the checkpoint has it if that is quantised, else bf16 on CUDA and fp32 on a CPU."""
    method: Method = field(default_factory=LoRA)
    """The method and its hyper-parameters, as {name: LoRA, rank: 16} or only LoRA."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the adapter is trained."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured."""
    output: str = "adapter"
    """Folder for the adapter, its recipe, metrics and checkpoints."""
    name: str = "default"
    """Name of the adapter on the model."""
    seed: int = 0
    """Seed of everything random: the adapter's start, the order of the rows, dropout."""


def check(recipe: Recipe) -> list[str]:
    """What is wrong with the values of a recipe whose types are right; one line a problem, each with the key."""
    t, e, problems = recipe.train, recipe.eval, []

    def need(ok: bool, text: str) -> None:
        if not ok:
            problems.append(text)

    try:
        packed = parse_base(recipe.base)[0] in FORMATS
        lossy = isinstance(recipe.method, LoRA) and recipe.method.init == "loftq"
        need(packed or not lossy, f"method.init: loftq begins with what packing loses, and base is {recipe.base!r}: write base: nf4")
    except WeftError as error:  # not e, which would be gone afterwards
        problems.append(f"base: {error}")
    need(t.lr is None or t.lr > 0, f"train.lr: {t.lr} must be above 0 (null takes the method's default)")
    need(t.warmup >= 0, f"train.warmup: {t.warmup} must not be below 0")
    need(0 <= t.lr_end <= 1, f"train.lr_end: {t.lr_end} is a share of train.lr, from 0 to 1")
    need(t.epochs > 0, f"train.epochs: {t.epochs} must be above 0")
    need(t.steps is None or t.steps > 0, f"train.steps: {t.steps} must be at least 1 (null: as many as train.epochs needs)")
    need(t.tokens > 0, f"train.tokens: {t.tokens} must be at least 1")
    need(t.accumulate > 0, f"train.accumulate: {t.accumulate} must be at least 1")
    need(all(0 <= b < 1 for b in t.betas), f"train.betas: {list(t.betas)} must lie in [0, 1)")
    need(t.eps > 0, f"train.eps: {t.eps} must be above 0")
    need(t.weight_decay >= 0, f"train.weight_decay: {t.weight_decay} must not be below 0")
    need(t.clip >= 0, f"train.clip: {t.clip} must not be below 0 (0: no clipping)")
    need(t.eval_every is None or t.eval_every >= 0, f"train.eval_every: {t.eval_every} must not be below 0")
    need(t.save_every is None or t.save_every > 0, f"train.save_every: {t.save_every} must be at least 1 (null: by time only)")
    need(t.save_seconds is None or t.save_seconds > 0, f"train.save_seconds: {t.save_seconds} must be above 0 (null: by steps only)")
    need(t.keep > 0, f"train.keep: {t.keep} must be at least 1")
    need(t.patience is None or t.patience > 0, f"train.patience: {t.patience} must be at least 1 (null: no early stop)")
    need(t.spike == 0 or t.spike > 1, f"train.spike: {t.spike} must be above 1 (0: no spike guard)")
    need(t.spike_steps > 0, f"train.spike_steps: {t.spike_steps} must be at least 1")
    try:
        amount(t.memory, "train.memory")
    except WeftError as error:
        problems.append(str(error))
    need(t.log_every > 0, f"train.log_every: {t.log_every} must be at least 1")
    named = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", t.device)
    need(bool(named), f'train.device: {t.device!r} is not "auto", "cpu", "cuda" or "cuda:1"')
    if named and t.device.startswith("cuda"):
        try:
            device_of(t.device, f"train.device: {t.device!r}")
        except WeftError as error:
            problems.append(str(error))
    need(t.threads is None or t.threads > 0, f"train.threads: {t.threads} must be at least 1 (null: torch's own number)")
    need(e.max_new_tokens > 0, f"eval.max_new_tokens: {e.max_new_tokens} must be at least 1")
    need(e.batch > 0, f"eval.batch: {e.batch} must be at least 1")
    need(bool(recipe.output), "output: must name a folder")
    need(bool(recipe.name), "name: must not be empty")
    return problems


def checked(recipe: Recipe) -> Recipe:
    """The recipe itself, or one WeftError with all that `check` finds."""
    if not isinstance(recipe, Recipe):
        how = "weft.train.load_recipe(...) makes one of a file or of a dict, as in load_recipe({'data': {'train': 'rows.jsonl'}})"
        raise WeftError(f"expected a Recipe, got a {type(recipe).__name__}: {how}")
    if problems := check(recipe):
        raise WeftError("the recipe cannot be used:\n  " + "\n  ".join(problems))
    return recipe
