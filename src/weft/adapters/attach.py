"""Putting adapters on a model, choosing which of them work, and taking them off again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import nn

from weft.adapters.targets import find, whole
from weft.core import (
    Adapter,
    Method,
    Mixture,
    Replaced,
    Site,
    WeftError,
    activate,
    check_open,
    close_site,
    is_linear,
    is_sharded,
    modules,
    open_site,
    sites,
    slot_of,
)

Model = TypeVar("Model", bound=nn.Module)


def adapt(model: Model, method: Method, name: str = "default") -> Model:
    """Put a new adapter of this method on a model, and let it alone work. The base is frozen; its keys and bytes stay.

    Args:
        model: Any module. It is changed in place and returned.
        method: For instance `weft.LoRA(rank=8, alpha=16, targets="all-linear")`.
        name: What to call this adapter from now on; any text without a dot.
    Raises:
        WeftError: if the name is taken, or no layer matches `method.targets` (the error lists what could have).
    """
    check_new(model, name)
    attach(model, build(model, method), name)
    return model


def build(model: nn.Module, method: Method, strict: bool = True) -> dict[str, Adapter]:
    """The adapters that `method` makes for a model, by path, attached to nothing yet. Under `torch.device("meta")` only their shapes."""
    if not isinstance(model, nn.Module) or not isinstance(method, Method):
        given = f"a {type(model).__name__} and " + (f"the class {method.__name__}" if isinstance(method, type) else f"{method!r:.60}")
        raise WeftError(f"an adapter takes a model and a method, as in weft.adapt(model, weft.LoRA(rank=8)); it was given {given}")
    saved = whole(model, method, strict)
    targets = {p: m for p, m in find(model, method, strict).items() if p not in saved}
    everything = dict(modules(model))
    also = method.also(everything, targets)
    built = method.build_all({p: cast(Site, m) for p, m in targets.items()})
    beyond = method.beyond(everything)
    ways: list[tuple[str, Collection[str]]] = [
        ("adapted as a layer by targets", built), ("trained whole by modules_to_save", saved), ("trained in its bias", also),
    ]  # fmt: skip
    if twice := [f"{p}: {way}" for way, paths in ways for p in paths if p in beyond]:
        raise WeftError(f"{', '.join(twice[:3])} and once more by a parameter's name or by its tokens; leave one of them out")
    built |= beyond
    for path, which in also.items():
        built[path] = Replaced(cast(Site, everything[path]), which)
    shared: dict[int, nn.Parameter] = {}  # what the model ties stays tied
    for path, module in saved.items():
        built[path] = Replaced(cast(Site, module), [n for n, p in module._parameters.items() if p is not None], shared)
    for adapter in built.values():
        adapter.method = method
    return built


def attach(model: nn.Module, built: dict[str, Adapter], name: str) -> None:
    """Give built adapters to a model under a name, and let them alone work."""
    everything = dict(modules(model))
    for path in built:  # before anything is attached
        check_open(everything[path], path)
    if not any(isinstance(m, Site) for m in everything.values()):
        model.requires_grad_(False)
    for path, adapter in built.items():
        module = everything[path]
        site, place = open_site(module, path), device_of(module)
        if place.type != "cpu":
            adapter.to(place)
        adapter.ready()
        slot_of(site)[name] = adapter if module.training else adapter.eval()
    use(model, name)


def device_of(module: nn.Module) -> torch.device:
    """Where a layer's own parameters are, or those of the layers inside it."""
    own = (p.device for p in module._parameters.values() if p is not None)
    return next(own, None) or next((p.device for p in module.parameters()), torch.device("cpu"))


def check_new(model: nn.Module, name: str) -> None:
    """Raise WeftError unless `name` may be given to a new adapter of this model."""
    if not isinstance(name, str) or not name or "." in name or name == "base":
        raise WeftError(f"{name!r} cannot name an adapter: use any text that is not empty, has no dot and is not 'base'")
    found = sites(model)
    _not_merged(found)
    if any(map(is_sharded, (p for _, m in modules(model) for p in m._parameters.values()))):
        raise WeftError("this model is sharded already: attach or load adapters first, then call fully_shard, which shards them as well")
    if any(name in slot_of(site) for site in found.values()):
        raise WeftError(f"this model has an adapter named {name!r} already: choose another name, or weft.remove(model, {name!r}) first")


def names(model: nn.Module) -> list[str]:
    """The adapters attached to a model, in the order in which they came."""
    found: dict[str, None] = {}
    for site in sites(model).values():
        found.update(dict.fromkeys(slot_of(site)))
    return list(found)


def active(model: nn.Module) -> tuple[str, ...]:
    """The adapters that work now."""
    found: dict[str, None] = {}
    for site in sites(model).values():
        found.update(dict.fromkeys(site.active))
    return tuple(found)


def attached(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The parts of one named adapter, by the path of their layer. Raises WeftError for an unknown name."""
    found = {path: slot_of(site)[name] for path, site in sites(model).items() if name in slot_of(site)}
    if not found:
        have = names(model)
        raise WeftError(
            f"no adapter named {name!r} here" + (f"; there are {', '.join(map(repr, have))}" if have else ": this model has none")
        )
    return found


def trainable(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one named adapter as "<path>.<parameter>", in a stable order; shared ones once."""
    seen: dict[int, None] = {}
    found: dict[str, nn.Parameter] = {}
    for path, adapter in attached(model, name).items():
        for key, p in adapter.named_parameters():
            if id(p) not in seen and key not in adapter.fixed:
                seen[id(p)] = None
                found[f"{path}.{key}"] = p
    return found


def use(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Choose the adapters that work: one name, several (each stands around the last; low-rank updates add up), or None for the bare base.

    Changes neither weights nor requires_grad. Raises WeftError for an unknown name, or while adapters are merged into the base.
    """
    chosen = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    found = sites(model)
    check_known(found, chosen)
    _not_merged(found)
    for site in found.values():
        activate(site, chosen)


@contextmanager
def using(model: nn.Module, names: str | Sequence[str] | None) -> Iterator[None]:
    """`use` for the length of a with-block; afterwards the adapters that worked before work again.

    None is the bare base also while adapters are merged into it: its own parameters stand in for the length of the block.
    """
    if names is None and any("kept" in site.__dict__ for site in sites(model).values()):
        with _bare(sites(model)):
            yield
        return
    before = active(model)
    use(model, names)
    try:
        yield
    finally:
        use(model, before)


@contextmanager
def _bare(found: dict[str, Site]) -> Iterator[None]:
    before = [(site, site.active, {key: _owned(site)[key] for key in site.__dict__.get("kept", ())}) for site in found.values()]
    try:
        for site in found.values():
            activate(site, ())
            _owned(site).update(site.__dict__.get("kept", {}))
        yield
    finally:
        for site, working, merged in before:
            activate(site, working)
            _owned(site).update(merged)


def _owned(site: Site) -> dict[str, nn.Parameter | None]:
    return cast(nn.Module, site)._parameters


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None], lengths: Sequence[int] | None = None) -> Iterator[None]:
    """Inside this with-block row i of every batch goes through the adapter `names[i]`, or through the bare base where that is None.

    Works with `model.generate`, beam search included (each beam keeps its row's adapter). Raises WeftError for an unknown name.
    lengths: tokens of each row, for a packed batch, where they lie end to end; its adapters must stand on linear layers (`by_token`).
    """
    if lengths is not None and len(lengths) != len(names):
        raise WeftError(f"{len(names)} rows have names and {len(lengths)} have lengths: give one of each for every row of the packed batch")
    found = sites(model)
    distinct = tuple(dict.fromkeys(n for n in names if n is not None))
    check_known(found, distinct)
    before = {path: site.active for path, site in found.items()}
    moved: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}  # one copy to a device, not one for each site
    try:
        for path, site in found.items():
            slot = slot_of(site)
            if not (here := [n for n in distinct if n in slot]):
                activate(site, ())
                continue
            owner = tuple(here.index(n) if n in here else -1 for n in names)
            mixture = Mixture([slot[n] for n in here], torch.tensor(owner), path, lengths)
            place = next((p.device for n in here for p in slot[n].parameters()), None) or device_of(cast(nn.Module, site))
            if place.type != "cpu" and lengths is None:
                if (owner, place) not in moved:
                    moved[owner, place] = mixture.rows.to(place)
                mixture.rows = moved[owner, place]
            activate(site, mixture)
        yield
    finally:
        for path, site in found.items():
            activate(site, before[path])


def by_token(model: nn.Module, method: Method, name: str) -> bool:
    """Whether the adapter `name`, or the one that the method would make, stands on linear layers alone: they see every token by itself, so
    that its rows may lie end to end with other adapters' rows. The output head may be given some tokens only, and does not count.
    """
    if name in names(model):
        places: Collection[str] = attached(model, name)
    else:
        with torch.device("meta"):
            places = build(model, method)
    everything, head = dict(modules(model)), getattr(model, "get_output_embeddings", lambda: None)()
    return all(is_linear(everything[p]) and everything[p] is not head for p in places)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take one named adapter off (None: all of them). A layer whose slot is empty becomes its own class again, bit for bit the base."""
    if name is not None:
        attached(model, name)  # an unknown name is an error
    for site in sites(model).values():
        if "kept" in site.__dict__:
            raise WeftError("adapters are merged into this base: call weft.unmerge(model) first")
        slot = slot_of(site)
        for gone in [n for n in slot if name in (None, n)]:
            del slot[gone]
        activate(site, tuple(n for n in site.active if n in slot))
        if not len(slot):
            close_site(site)


def _not_merged(found: dict[str, Site]) -> None:
    if merged := {n for site in found.values() for n in site.__dict__.get("kept_for", ())}:
        raise WeftError(f"{', '.join(sorted(merged))} is merged into the base: call weft.unmerge(model) before choosing other adapters")


def check_known(found: dict[str, Site], chosen: Sequence[str]) -> None:
    """Raise WeftError if one of these names is no adapter of the model's sites."""
    slots = [slot_of(site) for site in found.values()]
    if unknown := [n for n in chosen if not any(n in slot for slot in slots)]:  # in this order the cost is that of the sites alone
        have = {n for slot in slots for n in slot}
        there = f"there are {', '.join(map(repr, sorted(have)))}" if have else "this model has none"
        raise WeftError(f"no adapter named {', '.join(map(repr, unknown))} here; {there}")
