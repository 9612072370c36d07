"""EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA whose A starts as the main directions of each layer's inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import ceil
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from weft.adapters.attach import active, adapt, attach, attached, check_new, remove, use, using
from weft.adapters.combine_algebra import leading
from weft.adapters.targets import find
from weft.core import Adapter, Around, Site, WeftError, features, is_linear
from weft.methods.lora import LoRA, LowRank

Model = TypeVar("Model", bound=nn.Module)


class Watch(Adapter):
    """Changes nothing, and keeps the `most` main directions of its layer's inputs by incremental SVD: of [S Vᵀ; X] only the first stay."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.energy = most, 0.0
        self.seen: Tensor | None = None  # (≤ most, in) S Vᵀ

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.energy += float(rows.square().sum())
        made, _ = leading((rows if self.seen is None else torch.cat((self.seen, rows)))[None], self.most)
        A = made.A[0]  # √S Vᵀ; by iteration where the matrix is large: exact SVDs would take an hour for an 8B model
        self.seen = A.norm(dim=1, keepdim=True) * A
        return cast(Tensor, layer.frozen(x))


@torch.no_grad()
def eva(
    model: Model, method: LoRA, batches: Iterable[Any], *, name: str = "default", rho: float = 1.0,
    call: Callable[[Any], Any] | None = None,
) -> Model:  # fmt: skip
    """Attach a LoRA whose A starts as the first right singular vectors of each layer's inputs; B starts at zero.

    Args:
        method: On linear layers, with init="eva" or the usual one: A is filled here, and the file is a plain LoRA's.
        batches: What the model is called with: dictionaries of its keywords, or single tensors. Padding counts as data: give none.
        rho: Above 1, ranks move to layers where directions explain more of the inputs: a layer gets up to ρ · rank, and the ranks'
            sum stays.
        call: How the model is called with a batch, if otherwise.
    Raises:
        WeftError: another method or start, a target that is no linear layer, too few inputs for the ranks; what `adapt` raises.
    """
    check_new(model, name)
    found = cast("dict[str, Any]", find(model, method))
    if type(method) is not LoRA or method.init not in ("kaiming", "eva") or rho < 1 or not all(map(is_linear, found.values())):
        raise WeftError('eva takes a weft.LoRA on linear layers, with init="eva" or the usual one, and a rho of at least 1')
    method = replace(method, init="kaiming")
    ranks = {p: method.scaled(p) for p in found}
    watches = {p: Watch(min(ceil(rho * ranks[p][0]), features(m)[0])) for p, m in found.items()}
    for watch in watches.values():
        watch.method = method
    before = active(model)
    attach(model, cast("dict[str, Adapter]", watches), f"{name} watches")
    try:
        with using(model, f"{name} watches"):
            for batch in batches:
                if call is not None:
                    call(batch)
                    continue
                model(**batch) if isinstance(batch, dict) or hasattr(batch, "keys") else model(batch)
    finally:
        remove(model, f"{name} watches")
        use(model, before)
    short = [p for p, w in watches.items() if w.seen is None or len(w.seen) < w.most]
    if short:
        raise WeftError(f"the batches hold too few inputs for the rank of {', '.join(short[:5])}: give more")
    if rho > 1:
        shares = [(float(s) ** 2 / max(w.energy, 1e-30), p) for p, w in watches.items() for s in cast(Tensor, w.seen).norm(dim=1)]
        chosen = [p for _, p in sorted(shares, key=lambda share: -share[0])[: sum(r for r, _ in ranks.values())]]
        got = {p: chosen.count(p) for p in found if p in chosen}
        alphas = {f"^{re.escape(p)}": ranks[p][1] * (r**0.5 if method.rslora else r) for p, r in got.items()}
        exact = {f"^{re.escape(p)}": r for p, r in got.items()}
        method = replace(method, targets=tuple(got), rank_pattern=exact, alpha_pattern=alphas)
    adapt(model, method, name=name)
    for path, adapter in attached(model, name).items():
        seen = watches[path].seen if path in watches else None
        if isinstance(adapter, LowRank) and seen is not None:
            adapter.A.copy_(nn.functional.normalize(seen[: adapter.A.shape[0]]))
    return model
