"""What the user sees before training: how many rows and tokens, what was left out, and one row with its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from weft.data.config import DataConfig
from weft.data.encode import Example
from weft.data.formats import Row, shapes

OPEN, CLOSE = "⟦", "⟧"
LONG = 320  # characters of one stretch of the shown row; more is left out in its middle


@dataclass(frozen=True)
class Report:
    """rows: read; examples: trained on (a document may give several). tokens, learned: of the examples.

    empty: rows without anything to learn.  cut: rows whose whole answer lay beyond max_length; both are left out.
    shortened: rows that lost part of an answer.  shown: one row as stretches of (text, bears loss).
    """

    rows: int
    examples: int
    tokens: int
    learned: int
    empty: int
    cut: int
    shortened: int
    longest: int
    median: int
    formats: dict[str, int]
    sources: dict[str, int]
    loss_on: str
    max_length: int | None
    where: str = ""
    shown: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of tokens that bear loss, 0 to 1."""
        return self.learned / self.tokens

    def lines(self) -> list[tuple[str, str]]:
        """The report without the shown row, as (name, value)."""
        left_out = [f"{self.empty:,} empty"] if self.empty else []
        left_out += [f"{self.cut:,} cut (the answer lies beyond {self.max_length} tokens)"] if self.cut else []
        lines = [
            ("source", _counts(self.sources)),
            ("format", _counts(self.formats)),
            ("rows", f"{self.rows:,}" + (f", in {self.examples:,} pieces" if self.examples > self.rows else "")),
            ("left out", ", ".join(left_out) or "none"),
        ]
        if self.shortened:
            lines.append(("shortened", f"{self.shortened:,} rows lose the end of an answer at {self.max_length} tokens"))
        lines.append(("tokens", f"{self.tokens:,} (longest row {self.longest:,}, median {self.median:,})"))
        lines.append(("bear loss", f"{self.learned:,} tokens, {self.share:.1%} (loss on: {self.loss_on})"))
        return lines

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines())
        text = "".join(f"{OPEN}{part}{CLOSE}" if bears else part for part, bears in self.shown)
        rows = [f"{name:<{width}}  {value}" for name, value in self.lines()]
        return "\n".join([*rows, f"{self.where}, what bears loss in {OPEN} {CLOSE}:", text])

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, value in self.lines():
            table.add_row(Text(name, style="dim"), Text(value))
        shown = Text()
        for part, bears in self.shown:
            shown.append(part, style="bold green" if bears else "dim")
        return Group(table, Panel(shown, title=Text(f"{self.where}: the green part bears loss"), title_align="left", border_style="dim"))


def _counts(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{name} ({count:,} rows)" for name, count in list(counts.items())[:4]]
    return ", ".join(shown) + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")


def report(
    rows: Sequence[Row], examples: list[Example], tokenizer: Any, config: DataConfig, *, empty: int, cut: int, shortened: int
) -> Report:
    """Count, and choose the row to show: the first one of ordinary length."""
    lengths = np.array([len(example) for example in examples])
    median = int(np.median(lengths))
    chosen = next((example for example in examples if len(example) <= max(median, 16)), examples[0])
    sources: dict[str, int] = {}
    for row in rows:
        sources[row.source] = sources.get(row.source, 0) + 1
    return Report(
        rows=len(rows),
        examples=len(examples),
        tokens=int(lengths.sum()),
        learned=sum(int(example.bears.sum()) for example in examples),
        empty=empty,
        cut=cut,
        shortened=shortened,
        longest=int(lengths.max()),
        median=median,
        formats=shapes(rows),
        sources=sources,
        loss_on=config.loss_on,
        max_length=config.max_length,
        where=rows[chosen.row].where,
        shown=stretches(chosen, tokenizer),
    )


def stretches(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example's text in stretches that bear loss or do not, special tokens included, long ones without their middle."""
    edges = [0, *(np.flatnonzero(np.diff(example.bears)) + 1).tolist(), len(example)]
    parts = []
    for start, end in pairwise(edges):
        text = tokenizer.decode(example.ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        if len(text) > LONG:
            text = f"{text[: LONG // 2]} … {text[-LONG // 2 :]}"
        parts.append((text, bool(example.bears[start])))
    return parts
