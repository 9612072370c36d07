"""Views: modules under peft's names whose parameters are those of weft's adapters, and a slot that keeps out of the module tree.

Nothing here holds a weight. A view reads and writes through to the adapter in the slot, so `load_state_dict`, `.to()`, an optimiser, or
`layer.lora_A["default"].weight = ...` act on the one copy that there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, cast

import torch
from torch import nn

from weft.adapters.formats import NAMES
from weft.core import SLOT, Adapter, Site, Slot


class Through(MutableMapping[str, Any]):
    """A module's `_parameters` that lie in other modules: key -> (module, the parameter's name there), or None for a parameter left out."""

    def __init__(self, places: dict[str, tuple[nn.Module, str] | None]) -> None:
        self.places = places

    def __getitem__(self, key: str) -> nn.Parameter | None:
        place = self.places[key]
        return None if place is None else place[0]._parameters[place[1]]

    def __setitem__(self, key: str, value: nn.Parameter | None) -> None:
        place = self.places[key]
        if place is None:
            if value is not None:
                raise KeyError(f"this view of an adapter has no parameter {key!r} to set")
            return
        place[0]._parameters[place[1]] = value

    def __delitem__(self, key: str) -> None:
        del self.places[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self) -> Any:
        return Through, (self.places,)


class HiddenSlot(Slot):
    """A slot whose adapters the module tree shows elsewhere, under peft's names: it lists, saves and loads nothing itself."""

    def __len__(self) -> int:
        return len(self.held)

    @property
    def held(self) -> dict[str, Adapter]:
        return cast("dict[str, Adapter]", self.__dict__["held_adapters"])

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def __getitem__(self, name: str) -> Adapter:
        return self.held[name]

    def __setitem__(self, name: str, adapter: Adapter) -> None:
        self.held[name] = adapter

    def __delitem__(self, name: str) -> None:
        del self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
        return iter(())

    def train(self, mode: bool = True) -> HiddenSlot:
        for adapter in self.held.values():
            adapter.train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> HiddenSlot:
        for adapter in self.held.values():
            adapter._apply(fn)
        return self


class BufferDict(nn.Module):
    """Tensors by name that no file holds."""

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._buffers[name]
        assert value is not None
        return value

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self._buffers[name] = value
        self._non_persistent_buffers_set.add(name)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._buffers.keys()


def hide(site: Site) -> None:
    """Let a site's slot keep out of the module tree. Does nothing to one that does already."""
    slot = cast(nn.Module, site)._modules[SLOT]
    if not isinstance(slot, HiddenSlot):
        assert slot is not None
        held = {name: slot._modules[name] for name in list(slot._modules)}
        slot._modules.clear()
        slot.__dict__["held_adapters"] = held
        slot.__class__ = HiddenSlot


def show(site: Site) -> None:
    """Undo `hide`."""
    slot = cast(nn.Module, site)._modules[SLOT]
    if isinstance(slot, HiddenSlot):
        held = slot.__dict__.pop("held_adapters")
        slot.__class__ = Slot
        slot._modules.update(held)


def parts(adapter: Adapter) -> dict[str, dict[str, str]]:
    """What an adapter's parameters are called in peft: {"lora_A": {"weight": "A"}}; a bare tensor as {"vera_lambda_b": {"": "b"}}."""
    found: dict[str, dict[str, str]] = {}
    table = NAMES.get(type(adapter), {})
    for name, p in adapter._parameters.items():
        place = table.get(name, name)
        if p is not None and not place.startswith("base_layer."):
            container, _, inner = place.partition(".")
            found.setdefault(container, {})[inner] = name
    return found


def holder(container: str, adapter: Adapter, inside: dict[str, str], base: nn.Module) -> nn.Module:
    """The module `layer.lora_A["default"]`: it computes as peft's does and owns nothing."""
    weight = adapter._parameters[inside.get("weight", next(iter(inside.values())))]
    assert weight is not None
    places: dict[str, tuple[nn.Module, str] | None] = {key: (adapter, name) for key, name in inside.items()}
    made: nn.Module
    if container.startswith("ln_tuning"):
        made = _like(base)
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d) and weight.dim() == base.weight.dim():
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
        first = container.endswith("_A")
        how: dict[str, Any] = dict(stride=base.stride, padding=base.padding, dilation=base.dilation) if first else dict(groups=base.groups)
        made = kind(weight.shape[1] * how.get("groups", 1), weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta", **how)
        places = {"weight": places["weight"], "bias": places.get("bias")}
    elif weight.dim() == 2 and container.startswith("lora_") and not container.endswith("vector"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        places = {"weight": places["weight"], "bias": places.get("bias")}
    else:
        made = nn.Module()
    made.__dict__["_parameters"] = Through(places)
    made.training = adapter.training
    return made


def _like(base: nn.Module) -> nn.Module:
    kind: Any = type(base).__mro__[2] if isinstance(base, Site) else type(base)
    made: nn.Module = object.__new__(kind)
    made.__dict__.update({k: v for k, v in base.__dict__.items() if k not in ("active", "plan", "kept", "kept_for")})
    made.__dict__["_modules"] = {}
    return made


class Live(MutableMapping[str, Any]):
    """`layer.scaling`, `layer.r`: a number of each adapter, by name, read from (and where it can be, written to) the adapter itself."""

    def __init__(self, slot: Slot, attribute: str, names: list[str]) -> None:
        self.slot, self.attribute, self.names = slot, attribute, names

    def __getitem__(self, name: str) -> Any:
        if name not in self.slot:
            raise KeyError(name)
        adapter: Any = self.slot[name]
        return adapter.A.shape[0] if self.attribute == "rank" else getattr(adapter, self.attribute)

    def __setitem__(self, name: str, value: Any) -> None:
        if self.attribute == "rank":
            raise KeyError("the rank is the shape of the tensors: add an adapter with another rank instead")
        setattr(self.slot[name], self.attribute, value)

    def __delitem__(self, name: str) -> None:
        self.names.remove(name)

    def __iter__(self) -> Iterator[str]:
        return iter([n for n in self.names if n in self.slot])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(dict(self))


def bare(container: nn.ParameterDict, name: str, adapter: Adapter, parameter: str) -> None:
    """Add one parameter of an adapter to a ParameterDict of views."""
    held = container.__dict__["_parameters"]
    if not isinstance(held, Through):
        held = container.__dict__["_parameters"] = Through({})
    held.places[name] = (adapter, parameter)
    container._keys[name] = None  # type: ignore[index]


def frozen_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a layer's own floating-point weights; None if it has none."""
    return next((p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point()), None)
