from __future__ import annotations

import pytest

from weft.train import TrainConfig
from weft.train.schedule import learning_rate, warmup_steps


def rates(total: int, **kwargs: object) -> list[float]:
    return [learning_rate(s, total, 1.0, TrainConfig(**kwargs)) for s in range(total)]


def test_warmup_is_a_share_or_a_number():
    assert warmup_steps(0.05, 100) == 5 and warmup_steps(0.05, 10) == 1 and warmup_steps(7, 100) == 7
    assert warmup_steps(0.0, 100) == 0 and warmup_steps(500, 100) == 99 and warmup_steps(0.5, 1) == 0


def test_warmup_reaches_the_peak():
    assert rates(8, warmup=4, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_falls_by_equal_parts():
    assert rates(6, warmup=2, schedule="linear") == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine():
    r = rates(101, warmup=0, schedule="cosine", lr_end=0.1)
    assert r[0] == 1.0 and r == sorted(r, reverse=True) and min(r) > 0.1 and r[-1] == pytest.approx(0.1, abs=1e-3)
    assert r[50] == pytest.approx(0.1 + 0.9 * 0.5, abs=0.02)


def test_one_step_runs_at_the_peak():
    assert rates(1) == [1.0]
