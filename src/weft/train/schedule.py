"""The learning rate as a function of the step: warm-up, then cosine, linear or constant."""

from __future__ import annotations

from math import ceil, cos, pi

from weft.train.recipe import TrainConfig


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: a share of `total` below 1, a number of steps from 1 on; never all of them."""
    return min(ceil(warmup * total) if warmup < 1 else round(warmup), max(total - 1, 0))


def learning_rate(step: int, total: int, peak: float, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ..., total - 1.

    Warm-up rises in equal parts and reaches `peak` with its last step; the decay would touch `lr_end * peak` one step after the last,
    so no step is wasted on a rate of zero.
    """
    warm = warmup_steps(config.warmup, total)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(total - warm, 1)
    if config.schedule == "constant":
        return peak
    left = (1 + cos(pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return peak * (config.lr_end + (1 - config.lr_end) * left)
