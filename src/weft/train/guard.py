"""What stops a run before its end: a loss that went wrong, layers that never take part, and signals."""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import WeftError
from weft.train.checkpoint import State
from weft.train.recipe import TrainConfig

WINDOW = 50  # steps of the running median
MARGIN = 1.0  # nats above the median: a loss near 0 may well triple without anything being wrong


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the step was finished and a checkpoint written. `code` is what a shell expects as exit status."""

    def __init__(self, message: str, checkpoint: Path, number: int) -> None:
        super().__init__(message)
        self.checkpoint, self.code = checkpoint, 128 + number


class Diverged(WeftError):
    """The loss or gradient is not finite, or the loss spiked and stayed up."""


class LossGuard:
    """Watches loss and gradient norm of every step without making the device wait: they are looked at together, now and then."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.pending: list[tuple[int, Tensor, Tensor]] = []

    def watch(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Loss (nats a target token) and gradient norm of `step`, () fp32 each, still on the device."""
        self.pending.append((step, loss, norm))

    def check(self, state: State) -> tuple[float, float]:
        """Look at all steps since the last check (one transfer from the device); returns the last one's loss and norm. Raises Diverged."""
        values = torch.stack([torch.stack((loss.float(), norm.float())) for _, loss, norm in self.pending]).tolist()
        for (step, _, _), (loss, norm) in zip(self.pending, values, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
                raise Diverged(f"stopped at step {step}: {what}")
            self._spike(step, loss, state)
        self.pending.clear()
        return values[-1][0], values[-1][1]

    def _spike(self, step: int, loss: float, state: State) -> None:
        high = False
        if self.config.spike and len(state.losses) >= min(WINDOW, 10):
            median = statistics.median(state.losses)
            high = loss > self.config.spike * median and loss > median + MARGIN
        state.spiking = state.spiking + 1 if high else 0
        if not high:  # a spike does not move the median it is measured by
            state.losses = [*state.losses, loss][-WINDOW:]
        elif state.spiking >= self.config.spike_steps:
            raise Diverged(
                f"stopped at step {step}: for {state.spiking} steps the loss was over {self.config.spike:g} times its running median "
                f"(now {loss:.3g}, median {median:.3g})"
            )


class FirstStep:
    """Records which parameters receive a gradient in the first step; `check` names the layers whose forward is never called."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.missing = set(parameters)
        self.order = list(parameters)
        self.handles = [p.register_post_accumulate_grad_hook(partial(self._got, name)) for name, p in parameters.items()]

    def _got(self, name: str, parameter: Tensor) -> None:
        self.missing.discard(name)

    def check(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.missing:
            names = [n for n in self.order if n in self.missing]
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise WeftError(
                f"{len(names)} of {len(self.order)} adapter parameters got no gradient in the first step: {shown}. The forward of their "
                "layers is never called (the model uses the weight itself, or skips the layer). Leave them out with method.exclude."
            )


class Signals:
    """While it is open, SIGINT and SIGTERM are noted in `caught` and the step is finished; a second one acts as it always did.

    Outside the main thread signals cannot be caught, so nothing changes there.
    """

    caught = 0

    def __enter__(self) -> Signals:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
