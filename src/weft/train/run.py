"""A run in progress: what the loop works on, and all that happens between two steps."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft.adapters
from weft.core import Adapter, Method
from weft.data import Batch, Batches
from weft.step import prepare
from weft.train import checkpoint, optimisers
from weft.train.checkpoint import State
from weft.train.evaluate import mean_loss
from weft.train.flat import Flat
from weft.train.guard import FirstStep, Interrupted, LossGuard, Signals
from weft.train.metrics import Metrics, memory
from weft.train.output import Output
from weft.train.recipe import Recipe
from weft.train.speed import Profile, Speed

Event = dict[str, Any]


class _Stop(Exception):
    """A signal came while something long was going on."""


class Run:
    """All that the loop needs, and the order of things around a step: log, evaluate, save, stop."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, batches: Batches, evaluations: dict[str, Sequence[Batch]], output: Output, signals: Signals,
        tell: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self.model, self.recipe, self.config = model, recipe, recipe.train
        self.batches, self.evaluations, self.output, self.signals, self.tell = batches, evaluations, output, signals, tell
        self.adapters: dict[str, Adapter] = weft.adapters.attached(model, recipe.name)
        self.method: Method = next(iter(self.adapters.values())).method
        self.parameters = weft.adapters.trainable(model, recipe.name)
        self.device = next(iter(self.parameters.values())).device
        self.penalties = [a for a in self.adapters.values() if type(a).penalty is not Adapter.penalty]
        self.flat = Flat(self.parameters, self.method.lr_scale)
        c = self.config
        self.optimiser = optimisers.make(c.optimiser, self.flat, c.betas, c.eps, c.weight_decay)
        self.peak = self.config.lr if self.config.lr is not None else self.method.default_lr
        per_epoch = len(batches)
        self.micro = self.config.steps * self.config.accumulate if self.config.steps else math.ceil(self.config.epochs * per_epoch)
        self.steps = self.config.steps or math.ceil(self.micro / self.config.accumulate)
        self.eval_every = self.config.eval_every if self.config.eval_every is not None else max(1, self.steps // 10)
        self.state = State(threads=torch.get_num_threads())
        self.guard = LossGuard(self.config)
        self.first: FirstStep | None = FirstStep(self.parameters)
        self.saved: Path | None = None
        self.epoch: tuple[int, Sequence[Batch]] = (-1, [])
        self.pace = Speed(model, self.device)
        self.profile = Profile(output.folder / "profile", self.device.type == "cuda") if self.config.profile else None

    # ---- where the run is ----

    def resume(self, place: Path | None) -> None:
        """Go on from a checkpoint, or start; opens the metrics at the same place."""
        if place is not None:
            self.state, tensors = checkpoint.read(place)
            self.optimiser.load_state(tensors)
            self.flat.touched()
            for key, buffer in self._buffers().items():
                buffer.copy_(tensors[key])
            checkpoint.set_random_states(tensors, self.device)
            if self.config.threads is None:
                torch.set_num_threads(self.state.threads)
            self.saved = place
        self.metrics = Metrics(self.output.folder, self.state.metrics, self.state.step, self.config.tensorboard)
        self.began = self.last_save = time.perf_counter()
        self.before = self.state.seconds
        self.window = (self.began, self.state.tokens)  # since the last logged step, pauses left out
        self.speeds: list[float] = []

    def _buffers(self) -> dict[str, Tensor]:
        """State of the adapters that no gradient moves."""
        kept = {f"buffer.{path}.{key}": b for path, a in self.adapters.items() for key, b in a.named_buffers()}
        return kept | {f"buffer.{path}.{key}": a.get_parameter(key) for path, a in self.adapters.items() for key in sorted(a.fixed)}

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def over(self) -> bool:
        patience = self.config.patience
        return self.state.step >= self.steps or (patience is not None and self.state.worse >= patience)

    def next_group(self) -> list[Batch]:
        """The micro-batches of the next step, none when the run is over. Where they lie depends on the state alone."""
        if self.over():
            return []
        epoch, index, group = self.state.epoch, self.state.index, []
        for _ in range(min(self.config.accumulate, self.micro - self.state.micro)):
            if self.epoch[0] != epoch:
                self.epoch = epoch, self.batches.epoch(epoch)
            group.append(self.epoch[1][index])
            epoch, index = (epoch, index + 1) if index + 1 < len(self.epoch[1]) else (epoch + 1, 0)
        self.position = epoch, index
        return group

    # ---- around a step ----

    def begin(self) -> None:
        """Before the first step of this part of the run: the fast path, and the evaluation that is due."""
        self.model.train()
        self._prepare()
        self.start()

    def start(self) -> None:
        """The evaluation before the first step, if it is due; the clock runs from here."""
        self.window = time.perf_counter(), self.state.tokens
        if self._evaluation_due() and self.state.evaluated != self.state.step:
            self._interruptible(self.evaluate)

    def _prepare(self) -> None:
        """Choose the fast path of a step, and try it."""
        c = self.config
        self.batches.even = self.batches.packing and (self.device.type == "cuda" if c.compile is None else c.compile)
        first = self.batches.epoch(0)
        shapes = {tuple(b.input_ids.shape) for b in first[:8]} if not self.over() else set()
        largest = max(first, key=lambda b: b.input_ids.numel())
        self.fast = prepare(
            self.model, largest.to(self.device), self.parameters, memory=c.memory, compile=c.compile, fp8=c.fp8,
            graphs=c.graphs, varying=len(shapes) > 1, self_check=c.self_check, say=self.warn,
        )  # fmt: skip
        for line in (self.fast.describe(), *self.fast.said):
            self.tell({"event": "note", "text": line})
        self.tell({"event": "prepared", "seconds": self.fast.compile_seconds})

    def warn(self, text: str) -> None:
        """Something that the user should see, also where nothing else is shown: `Show` sees to that."""
        self.tell({"event": "note", "text": text, "warning": True})

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss, or None."""
        terms = [t for a in self.penalties if isinstance(t := a.penalty(), Tensor)]
        return torch.stack(terms).sum() if terms else None

    def check_gradients(self) -> None:
        """In the first step only: every parameter must have got a gradient."""
        if self.first is not None:
            self.first.check()
            self.first = None

    def stepped(self, group: Sequence[Batch], loss: Tensor, norm: Tensor, lr: float) -> None:
        """After a step: move on, and log, evaluate, save or stop as is due."""
        s = self.state
        s.step, s.micro, (s.epoch, s.index) = s.step + 1, s.micro + len(group), self.position
        s.tokens += sum(b.n_tokens for b in group)
        self.pace.took(group)
        if self.profile is not None and (table := self.profile.step(self.over())):
            self.tell({"event": "note", "text": table})
        self.guard.watch(s.step, loss, norm)
        log = s.step % self.config.log_every == 0 or s.step == self.steps
        if log or self.device.type == "cpu":  # reading a loss makes a GPU wait; on a CPU it costs nothing
            values = self.guard.check(s)
            self.tell({"event": "at", "step": s.step, "loss": values[0]})
            if log:
                self._log(*values, lr)
        if self.signals.caught:
            self._interrupt()
        if self._evaluation_due():
            self._interruptible(self.evaluate)
        if self._save_due():
            self.save()

    def _log(self, loss: float, norm: float, lr: float) -> None:
        now, s = time.perf_counter(), self.state
        gap = self.pace.gap()
        self.speeds = [*self.speeds, (s.tokens - self.window[1]) / max(now - self.window[0], 1e-9)][-20:]
        self.window = now, s.tokens
        line = {
            "step": s.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": s.tokens, "tokens_per_s": round(self.speeds[-1], 1),
            "seconds": round(self.seconds(), 3), "memory": memory(self.device),
        }  # fmt: skip
        if gap is not None:
            line["host_gap"] = round(gap, 4)
        self.metrics.add(line)
        self.tell({"event": "step", **line, "steps": self.steps, "epoch": s.micro / max(len(self.batches), 1)})

    def speed(self) -> float:
        """Tokens a second: the median over the latest logged stretches."""
        return sorted(self.speeds)[len(self.speeds) // 2] if self.speeds else 0.0

    # ---- evaluation ----

    def _evaluation_due(self) -> bool:
        if not self.evaluations:
            return False
        s = self.state.step
        return self.recipe.eval.start if s == 0 else s == self.steps or bool(self.eval_every and s % self.eval_every == 0)

    def evaluate(self) -> None:
        """The losses over the evaluation rows and over as many training rows; remembers the best."""
        paused, s = time.perf_counter(), self.state
        with weft.adapters.using(self.model, self.recipe.name):  # it may be one of several that train
            figures = {name: mean_loss(self.model, batches, self._between) for name, batches in self.evaluations.items()}
        s.evaluated, s.last = s.step, {"step": s.step, **figures}
        if "eval_loss" in figures and s.step:  # before the first step there is no adapter to be best
            better = figures["eval_loss"] < s.best.get("eval_loss", math.inf)
            if better:
                s.best = dict(s.last)
            s.worse = 0 if better else s.worse + 1
        self.metrics.add(s.last)
        self.tell({"event": "eval", **s.last, "steps": self.steps})
        self.window = self.window[0] + time.perf_counter() - paused, self.window[1]
        if self.config.patience is not None and s.best.get("step") == s.step:
            self.save()

    def _between(self) -> None:
        if self.signals.caught:
            raise _Stop

    def _interruptible(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except _Stop:
            self._interrupt()

    # ---- saving ----

    def _save_due(self) -> bool:
        if self.over() or self.state.spiking:  # what a spike leaves is not a good checkpoint
            return False
        steps, seconds = self.config.save_every, self.config.save_seconds
        return bool(steps and self.state.step % steps == 0) or bool(seconds and time.perf_counter() - self.last_save > seconds)

    def save(self) -> None:
        """Write a checkpoint, unless the loss went wrong since the last look at it."""
        paused = time.perf_counter()
        if self.guard.pending:
            self.guard.check(self.state)
        self.state.metrics, self.state.seconds, self.state.threads = self.metrics.position(), self.seconds(), torch.get_num_threads()
        tensors = self.optimiser.state() | self._buffers() | checkpoint.random_states(self.device)
        self.saved = checkpoint.write(self.output.checkpoints, self.state.step, self.state, tensors, self.adapter)
        best = self.state.best.get("step") if self.config.patience is not None else None
        checkpoint.prune(self.output.checkpoints, self.config.keep, best)
        self.last_save = time.perf_counter()
        self.window = self.window[0] + self.last_save - paused, self.window[1]
        self.tell({"event": "save", "step": self.state.step, "path": str(self.saved)})

    @property
    def adapter(self) -> Callable[[Path], Any]:
        """Saves the adapter into the folder it is called with."""
        return partial(self._save_adapter)

    def _save_adapter(self, folder: Path) -> None:
        weft.adapters.save(self.model, folder, name=self.recipe.name)

    def _interrupt(self) -> None:
        name = signal.Signals(self.signals.caught).name
        self.save()
        assert self.saved is not None
        raise Interrupted(
            f"stopped by {name} after step {self.state.step} of {self.steps}; a checkpoint is in {self.saved}. "
            "To go on, give the same command again (without --overwrite).",
            self.saved,
            self.signals.caught,
        )

    # ---- the end ----

    def take_best(self) -> None:
        """With `patience`: the adapter of the best evaluation, from its checkpoint."""
        best = self.state.best.get("step")
        if self.config.patience is None or not best or best == self.state.step:
            return
        tensors = checkpoint.read(self.output.checkpoints / checkpoint.name(best))[1]
        self.flat.data.copy_(tensors["masters"])
        self.flat.touched()
        for key, buffer in self._buffers().items():
            buffer.copy_(tensors[key])

    def last(self, work: Callable[[Callable[[], None]], Any]) -> Any:
        """Do something long after the last step; a signal meanwhile leaves a checkpoint, as in the loop."""
        return self._interruptible(lambda: work(self._between))

    def close(self) -> None:
        """Let go of files, of the profiler and of the adapter's flat buffer."""
        if self.first is not None:
            for handle in self.first.handles:
                handle.remove()
        if hasattr(self, "fast"):
            self.fast.close()
        if hasattr(self, "metrics"):
            self.metrics.close()
        if self.profile is not None:
            self.profile.close()
        self.flat.release()
