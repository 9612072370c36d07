"""Merging adapters into the base's weights, and restoring the base's own bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from weft.adapters.attach import active, check_known, remove
from weft.core import Site, WeftError, activate, is_sharded, logical, masters, modules, sites, slot_of
from weft.quant import settle

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model, names: str | Sequence[str] | None = None, *, keep: bool = True, untie: bool = False) -> Model:
    """Fold adapters into the weights: the same function without the adapters' cost. Each weight is computed in fp32 and rounded once.

    Args:
        names: Which adapters, in the order in which they stand around the layers. None: those that work now.
        keep: Keep the base's own parameters (as much memory again as the adapted layers), so that `unmerge` restores them exactly.
            False: merge for good; all adapters are dropped and the model is a plain one again.
        untie: Allow merging into a weight that another layer shares (a tied head): the layer gets a weight of its own.
    Raises:
        WeftError: nothing to merge, merged already, a method that has no merged form, or a shared weight without `untie`.
            Nothing has been changed then.
    """
    found = sites(model)
    chosen = active(model) if names is None else (names,) if isinstance(names, str) else tuple(names)
    check_known(found, chosen)
    if any("kept" in site.__dict__ for site in found.values()):
        raise WeftError("adapters are merged into this base already: call weft.unmerge(model) first")
    if not chosen:
        raise WeftError("nothing to merge: no adapter is active. Name one, as in weft.merge(model, 'default')")
    here = {p: s for p, s in found.items() if any(n in slot_of(s) for n in chosen)}
    _check(model, here, chosen, untie)
    tied: dict[tuple[int, ...], nn.Parameter] = {}
    with torch.no_grad():
        for site in here.values():
            fold(site, chosen, tied, keep)
    if untie and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        cast(Any, model).config.tie_word_embeddings = False
    if not keep:
        remove(model)
        for site in here.values():
            settle(cast(nn.Module, site))
    return model


def unmerge(model: Model) -> Model:
    """Give the base its own parameters back, byte for byte, and let the adapters that were merged work as before."""
    found = [site for site in sites(model).values() if "kept" in site.__dict__]
    if not found:
        raise WeftError("nothing to unmerge: no adapter is merged into this base")
    for site in found:
        for name, own in site.__dict__.pop("kept").items():
            cast(nn.Module, site)._parameters[name] = own
        activate(site, site.__dict__.pop("kept_for"))
    return model


def fold(site: Site, chosen: Sequence[str], tied: dict[tuple[int, ...], nn.Parameter], keep: bool) -> None:
    """Fold the named adapters of one layer into it, unchecked. `tied`: the new parameters so far, so that what is tied stays tied."""
    module, slot, before = cast(nn.Module, site), slot_of(site), site.active
    kept: dict[str, nn.Parameter | None] = {}
    past: dict[str, tuple[int, ...]] = {}  # of each parameter: what it was, and what it went through
    site.__dict__["kept"], site.__dict__["kept_for"] = kept, before  # `unmerged` gives the base from it, also to the adapters being folded
    for name in chosen:
        if name not in slot:
            continue
        for key, value in masters(slot[name]).merged(site).items():
            own = module._parameters.get(key)
            kept.setdefault(key, own)
            if own is None and not value.any():
                continue  # a bias that neither the layer nor the adapter has
            dtype = logical(module, key if own is not None else "weight")[1]  # a packed weight becomes numbers of the dtype it had
            source = slot[name].tie(key)
            past[key] = (*past.get(key, (id(own),)), id(site if source is None else source))
            new = nn.Parameter(value.to(dtype, copy=source is not None), requires_grad=False)
            module._parameters[key] = tied.setdefault(past[key], new)  # layers that were tied and went through the same stay tied
    activate(site, tuple(n for n in before if n not in chosen))
    if not keep:  # each old weight is gone before the next new one is made
        del site.__dict__["kept"], site.__dict__["kept_for"]


def _check(model: nn.Module, here: dict[str, Site], chosen: Sequence[str], untie: bool) -> None:
    if any(map(is_sharded, (p for site in here.values() for p in cast(nn.Module, site).parameters()))):
        raise WeftError("a sharded model is not merged: weft.save the adapter, and merge it into a base that one process holds whole")
    wrong = []
    for name in chosen:
        refused = [(p, r) for p, s in here.items() if name in slot_of(s) and (r := slot_of(s)[name].unmergeable(s))]
        wrong += [f"{name!r} at {path}: {reason}. Keep it unmerged" for path, reason in refused]
        kinds = {type(slot_of(site)[name].method) for site in here.values() if name in slot_of(site)}
        not_weights = "which is no change of weights and cannot be merged. Keep it unmerged"
        wrong += [f"{name!r} is an adapter of {k.__name__}, {not_weights}" for k in kinds if not k.mergeable]
    owners: dict[int, list[str]] = {}
    for path, module in modules(model):
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(path)
    if not untie:
        for path, site in here.items():
            for key, p in cast(nn.Module, site)._parameters.items():
                shared = [q for q in owners.get(id(p), []) if q != path] if p is not None else []
                together = all(q in here and set(chosen) & set(slot_of(here[q])) for q in shared)
                if shared and not (together and _same(site, [here[q] for q in shared], key, chosen)):
                    wrong.append(
                        f"{path}.{key} is shared with {', '.join(shared)}: merging would change that layer too. Pass untie=True to give "
                        f"{path} a weight of its own, or leave it out of the adapter's targets"
                    )
    if wrong:
        raise WeftError("\n".join(wrong))


def _same(site: Site, others: Sequence[Site], key: str, chosen: Sequence[str]) -> bool:
    """Whether the tied layers are changed by the same tied parameters, one after another (full fine-tuning keeps ties)."""
    mine, *theirs = ([slot_of(s)[n].tie(key) for n in chosen if n in slot_of(s)] for s in (site, *others))
    return all(p is not None for p in mine) and all([*map(id, each)] == [*map(id, mine)] for each in theirs)
