"""The arithmetic of combining, on tensors (`peft.utils.merge_utils`): what `add_weighted_adapter` does to factors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.adapters.combine_factors import thinned


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """(n,) weights with as many axes as the stacked tensors (n, ...)."""
    return weights.view(*weights.shape, *(1 for _ in range(task_tensors.dim() - weights.dim())))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """A tensor with only its largest entries: this share of them."""
    return thinned(tensor, density, at_random=False)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """A tensor with each entry kept with this probability; `rescale` keeps the mean."""
    kept = thinned(tensor, density, at_random=True)
    return kept if rescale else kept * density


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """"magnitude" or "random". From a density of 1 on the tensor itself, with a warning. Raises ValueError for one below 0."""
    if density >= 1:
        warnings.warn(f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=2)
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method not in ("magnitude", "random"):
        raise ValueError(f"Unknown method {method}")
    return magnitude_based_pruning(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """(n, ...) whether an entry has the sign that most of the n have: by their sum ("total") or their number ("frequency")."""
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    sign = tensor.sign()
    elected = torch.where((tensor if method == "total" else sign).sum(0) >= 0, 1, -1)
    return sign == elected


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean over those of the n that the mask keeps, entry by entry."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp_min(1.0)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum."""
    stacked = torch.stack(list(task_tensors))
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what is largest in each."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what chance left of each, scaled up (DARE, Yu et al. 2023)."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def ties(task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total") -> Tensor:
    """The mean of what is largest in each and of the elected sign (TIES, Yadav et al. 2023)."""
    return _elected([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_ties(task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total") -> Tensor:
    """The mean of what chance left of each and of the elected sign."""
    return _elected([prune(t, density, "random", rescale=True) for t in task_tensors], weights, majority_sign_method)


def _elected(kept: Sequence[Tensor], weights: Tensor, method: str) -> Tensor:
    stacked = torch.stack(list(kept))
    mask = calculate_majority_sign_mask(stacked, method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)
