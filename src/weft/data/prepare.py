"""From rows to what the loop trains on, with a report of what became of them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from weft.core import WeftError
from weft.data.config import DataConfig
from weft.data.encode import DOCUMENT, Encoder, Example, cut
from weft.data.formats import Row
from weft.data.report import Report, report

CHUNK = 256  # rows given to the tokenizer at once
PATIENCE = 2.0  # seconds before progress is shown


@dataclass(frozen=True)
class Prepared:
    """examples: what is trained on, in the order of the rows.  report: what the user is shown before training."""

    examples: list[Example]
    report: Report


def prepare(rows: Sequence[Row], tokenizer: Any, config: DataConfig, progress: bool = True, places: int = DOCUMENT) -> Prepared:
    """Tokenise rows, mark what bears loss, cut to `config.max_length`.

    places: Tokens that the model has places for: where no `max_length` is given, pieces of a document are no longer than that.

    Raises WeftError if the chat template refuses rows, if answers cannot be told from prompts, or if nothing is left to learn.
    """
    encoder = Encoder(tokenizer, config)
    limit = config.max_length
    examples: list[Example] = []
    empty = lost = shortened = 0
    needs: list[tuple[int, int]] = []  # of rows cut away: the tokens that keep something, and everything
    for start in _chunks(rows, progress):
        for offset, made in enumerate(encoder(rows[start : start + CHUNK])):
            index = start + offset
            if made is None:
                empty += 1
                continue
            ids, bears = made
            if rows[index].split:
                size = limit or min(DOCUMENT, places)
                pieces = [cut(ids[i : i + size], bears[i : i + size], size, index) for i in range(0, len(ids), size)]
                examples.extend(piece for piece in pieces if piece is not None)
                continue
            example = cut(ids, bears, limit, index)
            if example is None and len(ids) > (limit or len(ids)):
                lost += 1
                whole = [t for t in range(1, len(ids)) if bears[t]] or [0]
                needs.append((whole[0] + 1, whole[-1] + 1))
            elif example is None:
                empty += 1
            else:
                examples.append(example)
                shortened += limit is not None and any(bears[limit:])
    encoder.problems.check()
    if not examples:
        _nothing_left(rows, config, needs, empty)
    return Prepared(examples, report(rows, examples, tokenizer, config, empty=empty, cut=lost, shortened=shortened))


def question(row: Row, tokenizer: Any, config: DataConfig) -> tuple[list[int], str]:
    """For evaluation by generation: the ids to start from (the tokens before the last answer, as in training), and that answer's text."""
    ids = Encoder(tokenizer, config).prompt(row)
    return ids, next(m["content"] for m in reversed(row.messages) if m["role"] == "assistant")


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out), by lot from the seed alone; at least one row on either side. Rows keep their order."""
    if len(rows) < 2:
        raise WeftError(f"data.eval_split needs at least 2 rows to split, and there are {len(rows)}; name held-out rows in data.eval")
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _chunks(rows: Sequence[Row], progress: bool) -> Iterator[int]:
    """Where each chunk starts; with a bar on the terminal once it takes long."""
    began = time.monotonic()
    columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = progress and console.is_terminal  # elsewhere rich would print an empty line
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown) as bar:
        task = None
        for start in range(0, len(rows), CHUNK):
            if task is None and time.monotonic() - began > PATIENCE:
                task = bar.add_task("", total=len(rows))
            if task is not None:
                bar.update(task, completed=start, refresh=True)
            yield start


def _nothing_left(rows: Sequence[Row], config: DataConfig, needs: list[tuple[int, int]], empty: int) -> None:
    if not rows:
        raise WeftError("there are no rows to train on")
    if not needs:
        raise WeftError(f"nothing to learn: all {len(rows)} rows are empty (no answer, or a blank one), the first at {rows[0].where}")
    some, whole = min(first for first, _ in needs), max(last for _, last in needs)
    also = f" ({empty} more rows are empty)" if empty else ""
    raise WeftError(
        f"data.max_length {config.max_length} cuts every answer away: all {len(needs)} rows have a prompt of {config.max_length} tokens or "
        f"more{also}. The first answer appears with max_length {some}; {whole} keeps every row whole"
    )
