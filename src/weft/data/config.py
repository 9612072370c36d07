"""What a recipe says about data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weft.core import WeftError

Format = Literal["auto", "messages", "sharegpt", "prompt", "alpaca", "text"]


@dataclass
class DataConfig:
    """Where the rows come from and which of their tokens are learned.

    Args:
        train: a path, a glob, "hf:org/name[split]", or a list of them: JSONL, JSON, parquet, CSV or plain text.
        eval: the same, for held-out rows.
        eval_split: share of the training rows (0 to below 1) to hold out instead of `eval`.
        format: how rows are written; "auto" finds out.
        loss_on: "answer" learns every answer of a row, "last" only its last one, "all" every token. Rows of `text` are learned whole.
        template: "chat" writes rows with the tokenizer's chat template, "plain" as they are, "auto" with the template if there is one.
        max_length: tokens of a row; what is beyond is cut off at the right. None: nothing is cut.
        packing: lay rows end to end, so that there is no padding. Rows never see each other.
    """

    train: str | list[str]
    eval: str | list[str] | None = None
    eval_split: float = 0.0
    format: Format = "auto"
    loss_on: Literal["answer", "last", "all"] = "answer"
    template: Literal["auto", "chat", "plain"] = "auto"
    max_length: int | None = None
    packing: bool = True

    def __post_init__(self) -> None:
        wrong = []
        if not 0.0 <= self.eval_split < 1.0:
            wrong.append(f"data.eval_split is a share of the rows, from 0 to below 1, not {self.eval_split}; 0.05 holds out 5%")
        elif self.eval and self.eval_split:
            wrong.append(f"data.eval names held-out rows, and data.eval_split={self.eval_split} would hold out others: set one of the two")
        if self.max_length is not None and self.max_length < 2:
            wrong.append(f"data.max_length is {self.max_length}; a row needs at least 2 tokens (one to read, one to predict)")
        if wrong:
            raise WeftError("\n".join(wrong))
