"""The training loop."""

from __future__ import annotations

import torch

from weft.train.run import Run
from weft.train.schedule import learning_rate


def train(run: Run) -> None:
    """Take optimiser steps until the run is over. Gradients are those of the mean over all target tokens of the step's micro-batches."""
    config, flat = run.config, run.flat
    run.begin()
    while group := run.next_group():
        run.pace.starts()
        targets = sum(batch.n_targets for batch in group)
        loss = torch.zeros((), device=run.device)
        for batch in group:
            part = run.fast.loss(batch.to(run.device)) / targets
            part.backward()
            loss += part.detach()
        if (penalty := run.penalty()) is not None:
            penalty.backward()
        run.check_gradients()
        norm = flat.clip(config.clip)
        lr = learning_rate(run.state.step, run.steps, run.peak, config)
        run.optimiser.step(lr)
        run.method.after_step(run.adapters, run.state.step, run.steps)  # it may still want the gradients
        flat.zero_grad()
        run.stepped(group, loss, norm, lr)
