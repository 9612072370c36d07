"""peft's own arithmetic for combining LoRA adapters, which works on A and on B each by itself, for those who need its numbers.

It equals Σ wᵢΔWᵢ for "cat" and "svd" only. For the others B′A′ holds cross terms Bᵢ Aⱼ: two random adapters at 0.5 and 0.5 come out with
a relative error near 1. `weft.combine` is exact; this is what peft 0.21.2's `add_weighted_adapter` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from weft.adapters.attach import attach, attached, check_new
from weft.adapters.combine import How, plain_lora
from weft.adapters.combine_algebra import Factors, Majority, factors_of, is_low_rank, refuse, singular, stack
from weft.core import Site, WeftError, is_conv1d, sites


def combine_factors(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: How = "svd",
    *,
    rank: int | None = None,
    clamp: float | None = None,
    density: float | None = None,
    majority: Majority = "total",
) -> None:
    """Make one adapter of several as peft 0.21.2's `add_weighted_adapter` does, and let it alone work.

    Args:
        names, weights: The parts and their weights.
        how: peft's `combination_type`: "linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune" work on A and on B, those
            with "_svd" at the end and "svd" on ΔW, whose best approximation at `rank` (None: the largest of the parts') they take.
        clamp: A quantile beyond which the factors of an SVD are clamped (peft's `svd_clamp`).
        density, majority: As in `weft.combine`, but that the sign is elected before the weights are applied.
    Raises:
        WeftError: an unknown part or way, ranks that differ where the factors are added, parts that are no low-rank updates.

    What is dropped by the ways named dare comes from torch's global generator, drawn as peft draws it: in the order of the model's
    layers, A of each part before B. One fault of peft is not repeated: there a part with rsLoRA's scale comes out √rank times too large.
    """
    check_new(model, name)
    if how not in get_args(How):
        raise WeftError(f"how={how!r}: write one of {', '.join(get_args(How))}")
    if len(names) != len(weights) or not names:
        raise WeftError(f"{len(names)} adapters and {len(weights)} weights: give one weight for each, and at least one")
    if how not in ("linear", "cat", "svd") and (density is None or density < 0):
        raise WeftError(f"how={how!r} needs a density of at least 0, not {density!r}")
    parts, found = [attached(model, n) for n in names], sites(model)
    for n, part in zip(names, parts, strict=True):
        for path, adapter in part.items():
            if not is_low_rank(adapter):
                raise refuse(n, path, adapter, found[path])
    low_rank: list[Any] = [a for part in parts for a in part.values()]
    most = max(a.product()[0].shape[0] for a in low_rank)
    made: dict[str, Factors] = {}
    for path in [p for p in found if any(p in part for part in parts)]:
        here = [(part[path], float(w)) for part, w in zip(parts, weights, strict=True) if path in part]
        try:
            made[path] = combined(how, here, found[path], rank or most, clamp, density, majority)
        except RuntimeError:
            ranks = [cast(Any, a).product()[0].shape[0] for a, _ in here]
            if len(set(ranks)) == 1:
                raise
            raise WeftError(f"{path}: how={how!r} adds factors, so the parts need one rank, not {ranks}; use cat or svd") from None
    attach(model, plain_lora(model, made), name)


@torch.no_grad()
def combined(how: str, here: Sequence[tuple[Any, float]], layer: Site, rank: int, clamp: float | None,
             density: float | None, majority: Majority) -> Factors:  # fmt: skip
    """The factors of one layer, of (adapter, weight) pairs that are low-rank updates."""
    if how == "cat":
        stacked = stack([factors_of(a, layer) for a, _ in here], [1.0 for _ in here])
        scales = torch.cat([torch.full((a.product()[0].shape[0],), w * a.scale) for a, w in here]).to(stacked.A.device)
        B = torch.cat([a.product()[1].detach() for a, _ in here], 1)
        return Factors(B.view_as(stacked.B), stacked.A * scales.view(stacked.A.shape[0], -1, 1))
    if how == "svd" or how.endswith("_svd"):
        parts, shares = [factors_of(a, layer) for a, _ in here], [w for _, w in here]
        together = stack(parts, shares)
        if how == "svd" and clamp is None and rank <= min(together.rank, together.B.shape[1], together.A.shape[2]):
            U, S, Vh = (t.float() for t in singular(together))  # the sum's own SVD without the sum, but for signs, which a clamp sees
            return Factors(U[:, :, :rank] * S[:, None, :rank], Vh[:, :rank])
        updates = [p.dense() for p in parts]
        turned = isinstance(layer, nn.Embedding) or is_conv1d(layer)  # peft throws its dice over the weight as it lies
        updates = [u.mT.contiguous() for u in updates] if turned else updates
        wanted = _arithmetic(how.removesuffix("_svd"), updates, shares, density, majority)
        wanted = wanted.mT if turned else wanted
        U, S, Vh = torch.linalg.svd(wanted, full_matrices=False)
        B, A = U[:, :, :rank] * S[:, None, :rank], Vh[:, :rank]
        if clamp is not None:
            most = float(torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp))
            B, A = B.clamp(-most, most), A.clamp(-most, most)
        return Factors(B, A)
    scaled = [w * a.scale for a, w in here]
    roots = [abs(w) ** 0.5 for w in scaled]
    signed = [-r if w < 0 else r for r, w in zip(roots, scaled, strict=True)]  # one side carries the sign
    A = _arithmetic(how, [a.product()[0].detach() for a, _ in here], signed, density, majority)
    B = _arithmetic(how, [a.product()[1].detach() for a, _ in here], roots, density, majority)
    groups = getattr(layer, "groups", 1)
    return Factors(B.reshape(groups, -1, B.shape[1]), A.reshape(groups, A.shape[0] // groups, -1))


def _arithmetic(how: str, parts: Sequence[Tensor], weights: Sequence[float], density: float | None, majority: str) -> Tensor:
    """peft's task arithmetic: prune, elect signs among what is left, weigh, and add or average."""
    if density is not None and density < 1 and how not in ("linear", "svd"):
        parts = [thinned(p, density, at_random=how.startswith("dare")) for p in parts]
    found = torch.stack(list(parts))
    weighted = found * torch.tensor(weights, device=found.device).view(-1, *(1 for _ in found.shape[1:]))
    if not how.endswith("ties"):
        return weighted.sum(0)
    sign = found.sign()
    elected = torch.where((found if majority == "total" else sign).sum(0) >= 0, 1, -1)
    agree = sign == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1.0)


def thinned(x: Tensor, density: float, at_random: bool) -> Tensor:
    """x with a share `density` of its elements: at random and rescaled, or the largest."""
    if at_random:
        return x * torch.bernoulli(torch.full_like(x, density)) / density
    mask = torch.zeros_like(x).flatten()
    mask[x.abs().flatten().topk(int(density * x.numel())).indices] = 1
    return x * mask.view(x.shape)
