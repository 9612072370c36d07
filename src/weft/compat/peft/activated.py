"""Activated LoRA in the face: the door at the model itself, where its tokens come in, and peft's argument `alora_offsets`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.adapters.attach import device_of
from weft.compat.peft.kinds import as_value_error
from weft.compat.peft.views import hide, show
from weft.core import Adapter, Mixture, Site, activate, behind, close_site, open_site, slot_of
from weft.methods.alora_door import Door
from weft.methods.invocation import NEVER, last


class FaceDoor(Door):
    """weft's door, as long as one of its layers is at work. A call without tokens is warned of, as in peft, and is the base's."""

    def __init__(self, whole: Door, layers: Sequence[Site], name: str) -> None:
        super().__init__(whole.gate)
        self.__dict__["layers"], self.name = list(layers), name

    def around(self, layer: Any, adapters: Sequence[Any], rows: Tensor | None, call: dict[str, Any]) -> Any:
        if rows is None and not any(self.name in site.active for site in self.__dict__["layers"]):
            return layer.frozen(**call)
        return super().around(layer, adapters, rows, call)

    def ids(self, call: dict[str, Any]) -> Tensor:
        if call.get("input_ids") is not None or call.get("inputs_embeds") is None:
            return super().ids(call)
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward pass.", stacklevel=2
        )
        return torch.full(call["inputs_embeds"].shape[:2], NEVER, device=call["inputs_embeds"].device)


def put_door(model: nn.Module, built: dict[str, Adapter], name: str, layers: Sequence[Site]) -> None:
    """Take the door out of what a method has built, and give it to the model."""
    if not isinstance(built.get(""), Door):
        return
    whole, inner = cast(Door, built.pop("")), behind(model)
    with as_value_error():
        site = open_site(inner)
    hide(site)
    door = FaceDoor(whole, layers, name)
    door.method = next(iter(built.values())).method
    slot_of(site)[name] = door.to(device_of(inner)).train(inner.training)
    activate(site, tuple(slot_of(site)))


def drop_door(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter's door off (None: all of them); the model without one is of its own class again."""
    site: Any = behind(model)
    gone = [n for n in doors(model) if name in (None, n)]
    for each in gone:
        del slot_of(site)[each]
    if not gone:
        return
    activate(site, tuple(slot_of(site)))
    if not len(slot_of(site)):
        show(site)
        close_site(site)


def doors(model: nn.Module) -> dict[str, FaceDoor]:
    """The doors at a model, by the names of their adapters."""
    site: Any = behind(model)
    held = {n: slot_of(site)[n] for n in slot_of(site)} if isinstance(site, Site) else {}
    return {n: door for n, door in held.items() if isinstance(door, FaceDoor)}


@contextmanager
def told(model: nn.Module, names: Sequence[str] | None, offsets: Sequence[int | None] | None) -> Iterator[None]:
    """Inside, each row goes through the door of its own adapter (names), and begins where the caller says (offsets, from the end)."""
    found = doors(model)
    if not found or (names is None and offsets is None):
        yield
        return
    site, before = cast(Site, behind(model)), list(found)
    if names is not None:
        here = [n for n in before if n in names]
        rows = torch.tensor([here.index(n) if n in here else -1 for n in names], device=device_of(behind(model)))
        activate(site, Mixture([found[n] for n in here], rows, "") if here else ())
    for door in found.values():
        door.gate.offsets = offsets
    try:
        yield
    finally:
        for door in found.values():
            door.gate.offsets = door.gate.told = None
        activate(site, tuple(before))


def offsets_of(model: nn.Module, ids: Any, names: Sequence[str] | None, working: Sequence[str]) -> list[int | None] | None:
    """Where the invocation of each row's adapter begins in ids (n, T), from the end, None for a row without; None if there is no door."""
    found = doors(model)
    if not isinstance(ids, Tensor) or not any(n in found for n in names or working):
        return None
    ids = ids[None] if ids.dim() == 1 else ids
    each = list(names) if names is not None else [next(n for n in working if n in found)] * len(ids)
    starts = [int(last(row[None], found[n].gate.tokens)) if n in found else NEVER for row, n in zip(ids, each, strict=False)]
    return [None if s == NEVER else ids.shape[1] - s for s in starts]
