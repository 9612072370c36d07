"""Layers whose numbers a model reads and which it never calls: an adapter around such a layer would do nothing, and merge all the same."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Mapping
from functools import cache
from inspect import unwrap
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn


def never_called(everything: Mapping[str, nn.Module], path: str) -> bool:
    """Whether the module that holds the layer computes with the layer's weight or bias and calls it nowhere.

    nn.MultiheadAttention does so with out_proj, and Mamba with conv1d and dt_proj.
    """
    above, _, name = path.rpartition(".")
    kind: Any = type(everything[above]) if above in everything else nn.Module
    return name in _only_read(kind)


@cache
def _only_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names x of which the methods of a class have `self.x.weight` or `self.x.bias` and nothing else.

    What is done while it is made counts for nothing, and a class that leaves computing to others (no forward) may be anything.
    """
    if issubclass(kind, nn.MultiheadAttention):
        return frozenset({"out_proj"})
    owners = kind.__mro__[: kind.__mro__.index(nn.Module)]
    codes = [
        code for owner in owners for name, method in vars(owner).items()
        if callable(method) and (code := getattr(unwrap(method), "__code__", None)) and "init" not in name and "reset" not in name
    ]  # fmt: skip
    if not any("forward" in vars(owner) for owner in owners):
        return frozenset()
    numbers = {"weight", "bias"}
    read = {a for code in codes if numbers & {*code.co_names} for a, b in pairwise(_loaded(code)) if a and b in numbers}
    used = {a for code in codes for a, b in pairwise(_loaded(code)) if b not in numbers} if read else set()
    return frozenset(read - used)


def _loaded(code: CodeType) -> Iterator[str]:
    """The attributes that some code takes, in order; an empty name wherever it does something else."""
    for step in dis.get_instructions(code):
        yield str(step.argval) if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""
    yield ""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _loaded(constant)
