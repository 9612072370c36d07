"""One LoRA adapter out of several, with peft's arithmetic (`adapters/combine_factors`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import torch

from weft.adapters.combine import How
from weft.adapters.combine_factors import combined
from weft.compat.peft.config import listed
from weft.compat.peft.kinds import as_value_error
from weft.compat.peft.layers import fronts
from weft.compat.peft.wrappers import ModulesToSaveWrapper
from weft.core import Site


def add_weighted_adapter(
    self: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """A new adapter from several that are there, weighted; it does not work until it is chosen.

    Args:
        combination_type: "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
            "magnitude_prune", "magnitude_prune_svd". Of these "cat" gives the weighted sum of the updates exactly.
        svd_rank: The new rank for those with an SVD; by default the largest of the parts'.
        svd_full_matrices, svd_driver: Taken for peft's sake; the thin decomposition is enough.
        density: How much is kept, from 0 to 1, where something is pruned.
    Raises ValueError as peft does. `weft.combine` has exact forms of all of these.
    """
    if adapter_name in self.peft_config:
        return
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each")
    how, rank, targets = _checked(self, adapters, combination_type, svd_rank)
    if how not in ("linear", "cat", "svd") and density is None:
        raise ValueError(f"combination_type={how!r} needs a density between 0 and 1")
    first = self.peft_config[adapters[0]]
    config = replace(
        first, r=rank, lora_alpha=rank, target_modules=targets, alpha_pattern={}, rank_pattern={}, use_rslora=False, init_lora_weights=True
    )
    with listed(self.peft_config, adapter_name, config):
        self.inject_adapter(self.model, adapter_name)
    for front in fronts(self.model):
        if adapter_name not in front.trains:
            continue
        front.set_requires_grad(adapter_name, False)
        here = [(front.slot[n], float(w)) for n, w in zip(adapters, weights, strict=True) if n in front.trains]
        new: Any = front.slot[adapter_name]
        new.A.data.zero_()
        new.B.data.zero_()
        if not here:
            continue
        with torch.no_grad(), as_value_error():
            found = combined(how, here, cast(Site, front.get_base_layer()), rank, svd_clamp, density, cast(Any, majority_sign_method))
        A, B = found.A.reshape(-1, *new.A.shape[1:]), found.B.reshape(new.B.shape[0], -1, *new.B.shape[2:])
        new.A.data[: A.shape[0]] = A
        new.B.data[:, : B.shape[1]] = B


def add_weighted_ia3(self: Any, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """A new (IA)³ adapter whose vectors are the weighted sums of those that are there; it does not work until it is chosen.

    Raises ValueError for a name that is not there, and for targets of two kinds, names and a regular expression.
    """
    if adapter_name in self.peft_config:
        return
    if len(weights) != len(adapters) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each, and at least one adapter")
    for name in adapters:
        if name not in self.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
    configs = [self.peft_config[n] for n in adapters]
    targets, inner = _together([c.target_modules for c in configs]), _together([c.feedforward_modules for c in configs])
    config = replace(configs[0], target_modules=targets, feedforward_modules=inner)
    with listed(self.peft_config, adapter_name, config):
        self.inject_adapter(self.model, adapter_name)
    with torch.no_grad():
        for front in fronts(self.model):
            if adapter_name in front.trains:
                vectors: Any = front.ia3_l
                here = [(vectors[n], float(w)) for n, w in zip(adapters, weights, strict=True) if n in front.trains]
                vectors[adapter_name].copy_(torch.stack([w * v for v, w in here]).sum(0))
                front.set_requires_grad(adapter_name, False)


def _together(given: Sequence[Any]) -> Any:
    kinds = {type(g) for g in given}
    if len(kinds) > 1:
        raise ValueError("all adapter configs should follow the same target modules type")
    return "|".join(f"({g})" for g in given) if kinds == {str} else set().union(*(set(g or ()) for g in given))


def _checked(tuner: Any, adapters: Sequence[str], how: str, svd_rank: int | None) -> tuple[str, int, Any]:
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
        if tuner.peft_config[name].target_parameters:
            raise ValueError(f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}')")
    if with_tokens := [n for n in adapters if tuner.peft_config[n].trainable_token_indices]:
        raise ValueError(f"add_weighted_adapter does not support trained tokens (problematic adapters {with_tokens})")
    copies = [m for m in tuner.modules() if isinstance(m, ModulesToSaveWrapper) and sum(n in m.modules_to_save for n in adapters) > 1]
    if copies:
        raise ValueError(
            f"Cannot add weighted adapters if they target the same module with modules_to_save, but found {len(copies)} such instance(s)."
        )
    if not adapters:
        raise ValueError(f"Found no adapter matching the names in {adapters}")
    how = "linear" if len(adapters) == 1 else how
    if how not in get_args(How):
        raise ValueError(f"Invalid combination_type: {how}")
    configs = [tuner.peft_config[n] for n in adapters]
    ranks = [max(c.r, *(c.rank_pattern or {"": c.r}).values()) for c in configs]
    if how.endswith("svd"):
        rank = svd_rank or max(ranks)
    elif how == "cat":
        rank = sum(ranks)
    elif len(set(ranks)) != 1:
        raise ValueError("All adapters must have the same r value when using combination_type linear, ties, dare_ties or dare_linear.")
    else:
        rank = ranks[0]
    kinds = {type(c.target_modules) for c in configs}
    if len(kinds) > 1:
        raise ValueError(
            "all adapter configs should follow the same target modules type. "
            "Combining adapters with `target_modules` type being a mix of list/set and string is not supported."
        )
    if kinds == {str}:
        return how, rank, "|".join(f"({c.target_modules})" for c in configs)
    if kinds != {set}:
        raise TypeError(f"Invalid type {kinds.pop()} found in target_modules")
    return how, rank, set().union(*(c.target_modules for c in configs))
