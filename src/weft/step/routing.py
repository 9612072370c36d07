"""Batches in which several adapters have rows: who of them works where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from weft.adapters import rows, using


def routed(model: nn.Module, batch: Any) -> AbstractContextManager[None]:
    """Within it every row of a batch goes through its owner's adapter; where the batch names none, all as the model has it.

    The backward pass belongs into it too: what is computed again there asks again.
    """
    if not batch.owners:
        return nullcontext()
    return rows(model, batch.owners, None if batch.cu_seqlens is None else batch.lengths)


def each(model: nn.Module, batch: Any) -> Iterator[str | None]:
    """One owner of the batch's rows after another, while its adapter alone works on the model; None where the batch names none."""
    if not batch.owners:
        yield None
    for name in dict.fromkeys(batch.owners):
        with using(model, name):
            yield name
