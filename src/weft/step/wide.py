"""The down layers of fused MLPs, each one product with its adapter (`weft.kernels.widened`).

The frozen weight comes to lie in a wider tensor, beside a copy of its adapter's s·B. The layer's own weight is a view of its columns, so
whatever else reads it finds it as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.stacked import padded
from weft.step.gated import WIDE, usual
from weft.step.stacked import in_one_piece, tidy


class Wide:
    """One of them. What is traced of it are a tensor and a fact that are alike in all of a kind, which share one graph."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.plan = layer, layer.plan
        self.on = False  # within `working`: W holds s·B as it is
        self.W: Tensor | None = None
        self.columns: Tensor | None = None  # s·B
        self.weight: Any = None  # the layer's, and where in memory it lies
        self.place = 0
        self.handle: Any = None  # of a hook

    def install(self) -> None:
        weight, rank = self.layer.weight, len(self.plan.A)
        out, width = weight.shape
        self.W = weight.data.new_empty(out, width + padded(rank))
        # Writes to .data are not counted: they bring the same numbers, and a backward pass may be owed, until somebody steps.
        here, self.columns, rest = self.W.data.tensor_split((width, width + rank), 1)
        weight.data = here.copy_(weight.data)
        rest.zero_()
        self.weight, self.place = weight, weight.data_ptr()
        self.handle = self.layer.register_state_dict_post_hook(in_one_piece)

    def uninstall(self) -> None:
        if self.weight is not None and self.weight.data_ptr() == self.place:
            self.weight.data = self.weight.data.clone(memory_format=torch.contiguous_format)
        self.handle.remove()
        self.W, self.columns, self.weight = None, None, None

    def drop(self) -> None:
        """Let go of the weight, where the layer will not be called again: whoever still knows it holds nothing large."""
        if self.weight is not None:
            self.weight.data = self.weight.data.new_empty(0)
        self.W, self.columns, self.weight = None, None, None

    def valid(self) -> bool:
        """Whether the same adapter works on the same weight as when it was installed, and drops nothing now."""
        same = self.weight is not None and self.layer.weight is self.weight and self.weight.data_ptr() == self.place
        return same and self.layer.plan is self.plan and usual(self.layer)


def install(wides: Mapping[nn.Module, Wide]) -> None:
    for mlp, wide in wides.items():
        vars(mlp)[WIDE] = wide
        wide.install()
    tidy(wide.layer for wide in wides.values())


def uninstall(wides: Mapping[nn.Module, Wide]) -> None:
    installed = [wide for mlp, wide in wides.items() if vars(mlp).pop(WIDE, None) is not None]
    for wide in installed:
        wide.uninstall()
    tidy(wide.layer for wide in installed)


@contextmanager
def working(wides: Mapping[nn.Module, Wide]) -> Iterator[None]:
    """Within it, layers are wide where the adapters and weights are still those of `install`; their s·B are copied first."""
    valid = [wide for wide in wides.values() if wide.valid()]
    if valid:
        with torch.no_grad():
            scaled = torch._foreach_mul([wide.plan.B for wide in valid], [wide.plan.scale for wide in valid])
            torch._foreach_copy_([wide.columns for wide in valid], scaled)
    for wide in valid:
        wide.on = True
    try:
        yield
    finally:
        for wide in valid:
            wide.on = False
