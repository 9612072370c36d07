"""A site: a module with a slot for adapters. It gains no parameter, and none of its own is renamed.

A module becomes a site by swapping its class for `Site + its class`, as FSDP2 does. An empty slot costs one attribute
test and gives the base back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from weft.core.errors import WeftError

if TYPE_CHECKING:
    from weft.core.adapter import Adapter, Mixture

SLOT = "weft"  # the name under which a site's adapters appear in `state_dict()`: `<module>.weft.<adapter>.<parameter>`


def _never(module: nn.Module, inputs: Any) -> None:
    raise AssertionError("a slot is a container and is not called")


class Slot(nn.Module):
    """The named adapters of one site. A plain container: any name without a dot will do, `keys` and `0` too."""

    def __init__(self) -> None:
        super().__init__()
        # nn.TransformerEncoderLayer has a fused path for evaluation that reads its layers' weights and calls none of them. It keeps
        # off where any module below it has a hook; this one is never called, since nobody calls a slot.
        self.register_forward_pre_hook(_never)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Adapter:
        return cast("Adapter", self._modules[name])

    def __setitem__(self, name: str, adapter: Adapter) -> None:
        self._modules[name] = adapter  # not add_module(): it refuses names such as "type" that nn.Module uses itself

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)


class Site:
    """Mixin in front of a module's own class."""

    active: tuple[str, ...]  # names of the adapters that work now, in the order in which they stand around the layer
    plan: Any  # what forward calls: None (empty), an Adapter, a chain of them, or a Mixture that knows each row's own

    def frozen(self, *inputs: Any, **kwargs: Any) -> Any:
        """What this layer computed before any adapter."""
        return super().forward(*inputs, **kwargs)  # type: ignore[misc]

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        plan = self.plan
        if plan is None:
            return super().forward(*inputs, **kwargs)  # type: ignore[misc]
        return plan.forward(self, *inputs, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The swapped class has no importable name; pickle and deepcopy go by the class that it was made from.
        return _blank, (base_class(self),), self.__getstate__()


class Front(nn.Module):
    """A module that stands in front of another, at the other's place in the tree, and only adds names to it (the face of another library).

    weft looks through it: `modules` and `sites` give `behind` at the front's own path.
    """

    @property
    def behind(self) -> nn.Module:
        """The module that this one stands in front of."""
        raise NotImplementedError(f"{type(self).__name__} stands in front of nothing")


def behind(module: nn.Module) -> nn.Module:
    """A module without the fronts before it."""
    while isinstance(module, Front):
        module = module.behind
    return module


class Around:
    """A layer as a further adapter sees it: its `frozen` already holds the adapters before it."""

    def __init__(self, layer: Site | Around, inner: Adapter) -> None:
        self.layer, self.inner = layer, inner

    def frozen(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.inner.forward(self.layer, *inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class Part(Around):
    """A linear layer as the owner of some rows sees it: what the frozen layer makes of those rows is there already."""

    def __init__(self, layer: Site, x: Any, y: Any) -> None:
        self.layer, self.x, self.y = layer, x, y

    def frozen(self, *inputs: Any, **kwargs: Any) -> Any:
        if inputs[0] is self.x and not kwargs:
            return self.y.clone()  # an adapter may write into what it is given
        return self.layer.frozen(*inputs, **kwargs)


def plain(layer: Site | Around) -> Any:
    """The module itself, whatever adapters stand between it and the caller."""
    while isinstance(layer, Around):
        layer = layer.layer
    return layer


def unmerged(layer: Site | Around) -> Any:
    """The module with the base's own parameters: itself, or a twin of it while adapters are merged into it."""
    module = plain(layer)
    kept = module.__dict__.get("kept")
    if not kept:
        return module
    twin: Any = object.__new__(type(module))
    twin.__dict__ = module.__dict__ | {"_parameters": module._parameters | kept}
    return twin


class Chain:
    """Several active adapters: each stands around the last."""

    def __init__(self, adapters: tuple[Adapter, ...]) -> None:
        self.adapters = adapters

    def forward(self, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        seen: Site | Around = layer
        for inner in self.adapters[:-1]:
            seen = Around(seen, inner)
        return self.adapters[-1].forward(seen, *inputs, **kwargs)


_opened: dict[type, type] = {}


def _site_class(cls: type) -> type:
    if cls not in _opened:
        _opened[cls] = type(f"Site{cls.__name__}", (Site, cls), {"__module__": cls.__module__, "forward": _signed(cls)})
    return _opened[cls]


def _signed(cls: type) -> Any:
    """Site's forward with the signature of the class's own: `generate` and Trainers read there what a model takes. A copy of the function,
    not a wrapper around it, so that a call costs what it did."""
    made: Any = FunctionType(Site.forward.__code__, Site.forward.__globals__, "forward", None, Site.forward.__closure__)
    made.__wrapped__ = getattr(cls, "forward", None)
    return made


def _blank(cls: type) -> Any:
    made: Any = _site_class(cls)
    return made.__new__(made)


def base_class(module: object) -> type:
    """The class that a module had before it became a site (its class, if it is none)."""
    line = type(module).__mro__  # the class of a site that FSDP2 sharded stands before Site's
    return line[line.index(Site) + 1] if isinstance(module, Site) else type(module)


def open_site(module: nn.Module, path: str = "") -> Site:
    """Give a module the slot. Does nothing to a module that has one."""
    check_open(module, path)
    if isinstance(module, Site):
        return module
    module.register_module(SLOT, Slot())
    module.__class__ = _site_class(type(module))
    site = cast(Site, module)
    _set(site, (), None)
    return site


def check_open(module: nn.Module, path: str = "") -> None:
    """Raise WeftError unless a module is a site or can become one."""
    if not isinstance(module, Site) and "forward" in module.__dict__:
        raise WeftError(
            f"{path or type(module).__name__}: its forward was replaced on the object itself (accelerate's device_map does this, and "
            f"weft.step.prepare until it is closed), so an adapter here would never be called. Load the model without device_map and call "
            f"model.to(device) instead, or close() the prepared step first."
        )


def close_site(site: Site) -> None:
    """Take the slot away again: the module is what it was, class and keys."""
    module = cast(nn.Module, site)
    cls = base_class(module)
    del module._modules[SLOT]
    del module.__dict__["active"], module.__dict__["plan"]
    module.__class__ = cls


def slot_of(site: Site) -> Slot:
    """The container of a site's named adapters."""
    return cast(Slot, cast(nn.Module, site)._modules[SLOT])


def activate(site: Site, names: tuple[str, ...] | Mixture) -> None:
    """Let these adapters of the slot work from now on; names that the slot does not hold pass it by."""
    if not isinstance(names, tuple):
        _set(site, site.active, names)
        return
    slot = slot_of(site)
    here = tuple(n for n in names if n in slot)
    chain = sorted((slot[n] for n in here), key=lambda adapter: adapter.outer)
    _set(site, here, None if not here else chain[0] if len(here) == 1 else Chain(tuple(chain)))


def _set(site: Site, active: tuple[str, ...], plan: Any) -> None:
    # Past nn.Module's __setattr__, which would register the adapter a second time, as a submodule named "plan".
    site.__dict__["active"], site.__dict__["plan"] = active, plan


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base's own modules by path, as `named_modules()`, but never inside a slot: the cost does not grow with the adapters."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        module = behind(module)
        if id(module) in seen or isinstance(module, Slot):
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        stack.extend((prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None)


def sites(model: nn.Module) -> dict[str, Site]:
    """Every site of a model by its path, in the model's own order; the model itself is the path ''."""
    return {path: module for path, module in modules(model) if isinstance(module, Site)}
