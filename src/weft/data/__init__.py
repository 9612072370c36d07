"""Rows from files, the tokens that bear loss, and batches of them."""

from __future__ import annotations

from weft.data.batches import Batch, Batches, join, pack, pad
from weft.data.config import DataConfig
from weft.data.encode import Encoder, Example
from weft.data.formats import Row, load_rows
from weft.data.prepare import Prepared, prepare, question, split_rows
from weft.data.report import Report

__all__ = [
    "Batch",
    "Batches",
    "DataConfig",
    "Encoder",
    "Example",
    "Prepared",
    "Report",
    "Row",
    "join",
    "load_rows",
    "pack",
    "pad",
    "prepare",
    "question",
    "split_rows",
]
