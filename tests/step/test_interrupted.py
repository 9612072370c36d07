"""Somebody presses Ctrl-C while weights are being laid together."""

from __future__ import annotations

import pytest
import torch

from tests.step.test_stacked import model_of
from weft.step.stackable import stacks
from weft.step.stacked import install, uninstall


class Held(list):
    def append(self, item):
        if len(self) == 1:
            raise KeyboardInterrupt
        super().append(item)


def test_no_weight_is_moved_that_nobody_knows_of():
    model, _ = model_of()
    weights, found = {name: p.clone() for name, p in model.named_parameters()}, stacks(model, {})
    next(iter(found.values())).held = Held()
    with pytest.raises(KeyboardInterrupt):
        install(found, {})
    uninstall(found)
    assert all(torch.equal(p, weights[name]) and p.untyped_storage().nbytes() == p.nbytes for name, p in model.named_parameters())
