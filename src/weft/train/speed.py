"""How fast a run is, and beside what: the honest line, and the profile of where a step's time goes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from weft.core import features, is_linear, modules
from weft.data import Batch

FIRST, LAST = 3, 5  # the steps that are profiled: the ones before them compile and fill caches


class Speed:
    """Counts what a run computes. On CUDA it also knows what the card sustains, and how long the card waited between two steps."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.parameters = sum(i * o for i, o in (features(m) for _, m in modules(model) if is_linear(m)))
        self.tokens = self.padded = self.targets = 0
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        self.ended: Any = None
        self.limit: float | None = None

    def starts(self) -> None:
        """A step starts: what the card waited for it is from the end of the last one to here."""
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            if self.ended is not None:
                self.marks.append((self.ended, now))

    def took(self, group: Sequence[Batch]) -> None:
        """A step was given to the card."""
        self.tokens += sum(b.n_tokens for b in group)
        self.padded += sum(b.input_ids.numel() for b in group)
        self.targets += sum(b.n_targets for b in group)
        if self.cuda:
            self.ended = torch.cuda.Event(enable_timing=True)
            self.ended.record()

    def gap(self) -> float | None:
        """Seconds that the card waited for the host, over all steps since the last call. Call it after a synchronisation."""
        if not self.cuda:
            return None
        waited = sum(a.elapsed_time(b) for a, b in self.marks if b.query()) / 1e3
        self.marks.clear()
        self.ended = None  # what the log itself takes is not a gap of the loop
        return waited

    def sustained(self) -> float:
        """FLOP/s of a bf16 product on this card over half a second: a card slows down once it is warm."""
        if self.limit is None:
            a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
            torch.cuda.synchronize(self.device)
            started, done, out = time.perf_counter(), 0, torch.empty_like(a)
            while time.perf_counter() - started < 0.5:
                for _ in range(50):
                    torch.mm(a, a, out=out)
                torch.cuda.synchronize(self.device)
                done += 50
            self.limit = done * 2 * 4096**3 / (time.perf_counter() - started)
        return self.limit

    def describe(self, tokens_per_s: float, compile_seconds: float) -> str:
        """The line at a run's end. The card's share counts 4 FLOPs a frozen weight and token: forward and dX."""
        parts = [f"{tokens_per_s:,.0f} tokens/s"]
        if self.cuda:
            share = 4 * self.parameters * tokens_per_s / self.sustained()
            parts.append(f"{share:.0%} of what this card sustains ({self.limit or 0:.3g} FLOP/s in bf16)")
        parts.append(f"padding {1 - self.tokens / max(self.padded, 1):.1%}")
        parts.append(f"{self.targets / max(self.tokens, 1):.1%} of the tokens bear loss")
        parts.append(f"{compile_seconds:.1f} s to compile and check")
        return ", ".join(parts)


class Profile:
    """A trace of a few steps, and a table of its longest parts."""

    def __init__(self, folder: Path, cuda: bool) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes lines of its own between ours
        self.folder = folder
        self.seen = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
        self.key = "self_device_time_total" if cuda else "self_cpu_time_total"
        self.running = False
        self.steps = 0  # of this part of the run: one that goes on compiles and fills its caches anew

    def step(self, last: bool) -> str | None:
        """After a step; the table once it is there, or why there will be none."""
        self.steps += 1
        if self.running and (self.steps == LAST or last):
            self.close()
            return self._write()
        if self.steps == FIRST - 1 and not last:
            self.seen.start()
            self.running = True
        elif last and self.steps < FIRST:
            return f"there is no profile: it is of steps {FIRST} to {LAST}, and this run took {self.steps}"
        return None

    def close(self) -> None:
        """Stop, if it runs: torch breaks the process off at its end otherwise."""
        if self.running:
            self.seen.stop()
            self.running = False

    def _write(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seen.export_chrome_trace(str(self.folder / "trace.json"))
        total: Counter[str] = Counter()
        for event in self.seen.key_averages():
            total[event.key[:80]] += getattr(event, self.key)
        whole, steps = sum(total.values()) or 1, self.steps - FIRST + 1
        lines = [f"{time_ / 1e3 / steps:10.2f} ms  {time_ / whole:6.1%}  {name}" for name, time_ in total.most_common(20)]
        text = "\n".join([f"where a step's time goes ({self.folder / 'trace.json'} has all of it)", *lines])
        (self.folder / "table.txt").write_text(text + "\n", encoding="utf-8")
        return text
