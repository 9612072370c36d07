"""What a layer is given besides the hidden states: what of it a graph freezes, and the tensors in it, whose numbers a graph reads anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.step.capture import Unfit

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def like(t: Tensor) -> Any:
    return t.shape, t.stride(), t.dtype, t.device


def kind(value: Any, device: torch.device, places: dict[int, int]) -> Any:
    """All of it that a graph freezes, hashable: everything but the numbers in the tensors. Which tensors are one object is part of it."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.requires_grad or value.device != device:
            raise Unfit("a layer is given a tensor that has a gradient, is of a class of its own or lies on another device")
        return places.setdefault(id(value), len(places)), like(value)
    if type(value) in (tuple, list):
        return type(value), *(kind(v, device, places) for v in value)
    if type(value) is dict:
        return dict, *((k, kind(v, device, places)) for k, v in value.items())
    if type(value) in PLAIN:
        return type(value), value
    raise Unfit(f"a layer is given an object of which nothing is known ({type(value).__name__})")


def tensors(value: Any) -> list[Tensor]:
    """Each tensor in it, once, in a fixed order."""
    found: dict[int, Tensor] = {}
    each(value, lambda t: found.setdefault(id(t), t))
    return list(found.values())


def each(value: Any, do: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return do(value)
    if type(value) in (tuple, list):
        return type(value)(each(v, do) for v in value)
    return {k: each(v, do) for k, v in value.items()} if type(value) is dict else value


def whole(t: Tensor) -> Tensor:
    """Without the axes along which it is expanded."""
    return t[tuple(slice(0, 1) if step == 0 else slice(None) for step in t.stride())]


def static(t: Tensor) -> Tensor:
    """A tensor of its own with the same numbers, shape and strides."""
    part = whole(t.detach())
    made = torch.empty_strided(part.shape, part.stride(), dtype=t.dtype, device=t.device).copy_(part)
    return made if made.shape == t.shape else made.expand(t.shape)
