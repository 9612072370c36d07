"""What is shown while training."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from weft.train.progress import Show

STEP = {"event": "step", "step": 30, "steps": 2000, "loss": 0.356, "lr": 2e-4, "tokens_per_s": 3566, "memory": 634 * 2**20, "seconds": 3.0}
EVAL = {"event": "eval", "step": 30, "steps": 2000, "eval_loss": 0.361, "train_loss": 0.2645}


@pytest.mark.parametrize(
    ("width", "seen", "gone"), [(60, "loss 0.3560", "tokens/s"), (80, "3,566 tokens/s", "MiB"), (120, "train loss", "…")]
)
def test_the_bar_its_steps_and_the_loss_are_seen_on_a_narrow_terminal(width, seen, gone):
    text = io.StringIO()
    show = Show("bar", Console(file=text, width=width, force_terminal=True, color_system=None))
    for event in ({"event": "start", "step": 0, "steps": 2000}, EVAL, STEP, {"event": "at", "step": 31, "loss": 0.356}, {"event": "end"}):
        show(event)
    last = [line for line in text.getvalue().splitlines() if "/2000" in line][-1]
    assert "31/2000" in last and seen in last and gone not in last


def test_lines():
    text = io.StringIO()
    show = Show("lines", Console(file=text, width=200), name="a")
    for event in (EVAL, STEP):
        show(event)
    assert text.getvalue().splitlines() == [
        "a: step 30/2000  eval loss 0.3610  train loss 0.2645",
        "a: step 30/2000  loss 0.3560  lr 2.00e-04  3,566 tokens/s  634 MiB  3:17 left",
    ]
