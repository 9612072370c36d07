"""The training loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.data import Batch
from weft.train.run import Run
from weft.train.schedule import learning_rate


def train(run: Run) -> None:
    """Take optimiser steps until the run is over. Gradients are those of the mean over all target tokens of the step's micro-batches."""
    run.begin()
    while group := run.next_group():
        run.pace.starts()
        targets = sum(batch.n_targets for batch in group)
        loss = torch.zeros((), device=run.device)
        for batch in group:
            part = run.fast.loss(batch.to(run.device)) / targets
            part.backward()
            loss += part.detach()
            del part  # with its graph: nothing of a pass may be left when the next one's layers are captured
        update(run, group, loss)


def update(run: Run, group: Sequence[Batch], loss: torch.Tensor) -> None:
    """One optimiser step with the gradients that the step's micro-batches left. loss: their mean over all target tokens, ()."""
    if (penalty := run.penalty()) is not None:
        penalty.backward()
    run.check_gradients()
    norm = run.flat.clip(run.config.clip)
    lr = learning_rate(run.state.step, run.steps, run.peak, run.config)
    run.optimiser.step(lr)
    run.flat.touched()
    run.method.after_step(run.adapters, run.state.step, run.steps)  # it may still want the gradients
    run.flat.zero_grad()
    run.stepped(group, loss, norm, lr)
