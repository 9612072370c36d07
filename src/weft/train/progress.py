"""What is shown while training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

logger = logging.getLogger("weft")

BESIDE = ("loss", "eval loss", "speed", "lr", "memory", "train loss")  # the bar, while there is width: the first ones matter most


class Show:
    """Turns a run's events into output. `how` is "auto", "bar", "lines" or "off"; `name` stands before each line of one of several runs.

    With "off" nothing is shown, and warnings go to the log.
    """

    def __init__(self, how: str, console: Console | None = None, name: str = "") -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.results = console or Console(highlight=False, soft_wrap=True)  # standard output carries results, standard error the rest
        self.how = ("bar" if self.console.is_terminal else "lines") if how == "auto" else how
        self.name = f"{name}: " if name else ""
        self.bar: Progress | None = None
        self.figures: dict[str, str] = {}

    def text(self, text: object) -> None:
        """Free text as it is, or what rich can show."""
        if self.how == "bar":
            self.console.print(text, markup=False)
        elif self.how == "lines":
            self.console.print(str(text), markup=False)

    def __call__(self, event: dict[str, Any]) -> None:
        if self.how == "off":
            if event.get("warning"):
                logger.warning("%s%s", self.name, event["text"])
            return
        kind = event["event"]
        if kind == "note":
            self.text(event["text"])
        if kind == "start":
            self._start(event["step"], event["steps"])
        elif kind == "at":
            self.figures["loss"] = f"loss {event['loss']:.4f}"
            self._advance(event["step"])
        elif kind == "step":
            figures = {
                "loss": f"loss {event['loss']:.4f}", "lr": f"lr {event['lr']:.2e}", "speed": f"{event['tokens_per_s']:,.0f} tokens/s",
                "memory": f"{event['memory'] / 2**20:,.0f} MiB",
            }  # fmt: skip
            self.figures |= figures
            self._advance(event["step"])
            if self.how == "lines":
                left = (event["steps"] - event["step"]) * event["seconds"] / event["step"]
                self.text(f"{self.name}step {event['step']}/{event['steps']}  {'  '.join(figures.values())}  {clock(left)} left")
        elif kind == "eval":
            figures = {(named := k.replace("_", " ")): f"{named} {v:.4f}" for k, v in event.items() if k.endswith("loss")}
            self.figures |= figures
            self._advance(event["step"])
            if self.how == "lines":
                self.text(f"{self.name}step {event['step']}/{event['steps']}  {'  '.join(figures.values())}")
        elif kind in ("end", "stop"):
            self.close()

    def _start(self, step: int, steps: int) -> None:
        if self.how == "bar":
            self.bar = Progress(
                BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
                # the figures alone give way on a narrow terminal, from the right
                TextColumn("{task.fields[shown]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                console=self.console, expand=True,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=step, shown="")
            self.bar.start()

    def _advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, shown="  ".join(self.figures[k] for k in BESIDE if k in self.figures))

    def table(self, rows: dict[str, str]) -> None:
        """The final figures."""
        if self.how == "off":
            return
        table = Table(show_header=False)
        for key, value in rows.items():
            table.add_row(key, value)
        self.results.print(table)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
