"""Several adapters made into one, exactly on what they add to the weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args
from zlib import crc32

import torch
from torch import Tensor, nn

from weft.adapters.attach import attach, attached, check_new, device_of
from weft.adapters.combine_algebra import (
    Factors,
    Majority,
    elementwise,
    factors_of,
    give,
    is_low_rank,
    leading,
    refuse,
    shorten,
    stack,
)
from weft.adapters.formats import short_names
from weft.core import Adapter, Replaced, Site, WeftError, modules, sites
from weft.methods import LoRA

How = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer of a low-rank approximation: its rank, ‖ΔW‖ of what was wanted (Frobenius), and the share of ‖ΔW‖² that is kept."""

    rank: int
    norm: float
    kept: float


@dataclass(frozen=True)
class Kept:
    """How much of the wanted updates a low-rank adapter holds, layer by layer. `str()` gives a line, and the layers that lost most.

    notes: What else there is to know: parts of a model that no low-rank adapter holds.
    """

    layers: Mapping[str, Layer]
    notes: tuple[str, ...] = field(default=())

    @property
    def energy(self) -> float:
        """The share of Σ ‖ΔW‖² over all layers that is kept: 1 if nothing was lost."""
        whole = sum(x.norm**2 for x in self.layers.values())
        return sum(x.kept * x.norm**2 for x in self.layers.values()) / whole if whole else 1.0

    @property
    def error(self) -> float:
        """√(1 - energy): the Frobenius norm of what was lost over that of what was wanted."""
        return float(max(0.0, 1 - self.energy) ** 0.5)

    def __str__(self) -> str:
        ranks = [x.rank for x in self.layers.values()]
        if not ranks:
            return "\n  ".join(["no layer by low rank", *self.notes])
        span = f"rank {ranks[0]}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
        lines = [f"{self.energy:.2%} of ‖ΔW‖² kept on {len(ranks)} layers, {span} (relative error {self.error:.2g})"]
        worst = sorted(self.layers.items(), key=lambda item: item[1].kept)[:3]
        lines += [f"  {path}: {x.kept:.2%} at rank {x.rank}" for path, x in worst if x.kept < 0.9995]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str = "combined",
    how: How = "linear",
    *,
    rank: int | None = None,
    density: float | Mapping[str, float] | None = None,
    majority: Majority = "total",
    seed: int = 0,
) -> Kept:
    """Make one adapter of several and let it alone work. What is combined is what they add to the weights, ΔWᵢ = sᵢ Bᵢ Aᵢ, whatever
    their ranks, scales and targets; a layer that a part does not adapt has ΔWᵢ = 0.

    Args:
        weights: Each part and its weight; negative ones take away.
        how: What the new ΔW is.
            "linear": Σ wᵢΔWᵢ, exactly, at the rank that it really has (at most the sum of the parts').
            "cat": the same, with the parts' factors side by side as they are.
            "svd": the best approximation of Σ wᵢΔWᵢ at `rank`.
            "magnitude_prune", "ties", "dare_linear", "dare_ties": elements of each ΔWᵢ are pruned to a density before they are added
            up (the largest kept; or at random and rescaled), and where the name says ties, elements whose sign loses an election are
            left out and the rest averaged; then the best approximation at `rank`. With "_svd" at the end, as peft writes them: the same.
        rank: Of the result, where it is approximated; None: the largest of the parts'.
        density: The share of elements that is kept, above 0 and at most 1; or one for each part.
        majority: How ties elects a sign: by the "total" of the elements or by "frequency".
        seed: Of what is dropped at random. The same for any device, and for any order in which adapters were loaded.
    Returns:
        The share of the wanted update that is kept, by layer.
    Raises:
        WeftError: an unknown part, way, rank or density; a part that is no low-rank update (`weft.convert` makes one of it).
    """
    check_new(model, name)
    names, plain_how = list(weights), how.removesuffix("_svd") if isinstance(how, str) else how
    densities = _checked(names, weights, how, rank, density, majority)
    parts = {n: attached(model, n) for n in names}
    found = sites(model)
    _check_parts(parts, found)
    paths = [p for p in found if any(p in part for part in parts.values())]
    by_element = None if plain_how in ("linear", "cat", "svd") else elementwise(plain_how, majority)
    low_rank: list[Any] = [a for part in parts.values() for a in part.values() if is_low_rank(a)]
    largest: int = max((a.product()[0].shape[0] for a in low_rank), default=1)
    made: dict[str, Factors] = {}
    layers: dict[str, Layer] = {}
    spread: dict[str, dict[str, Tensor]] = {}  # biases: path -> name -> ΔW
    with torch.no_grad():
        for path in paths:
            here = [n for n in names if path in parts[n]]
            layer, w = found[path], [float(weights[n]) for n in here]
            dice = [torch.Generator().manual_seed(crc32(f"{seed} {path} {names.index(n)}".encode())) for n in here]
            arguments = (w, [densities[n] for n in here], dice)
            spread[path] = _biases([parts[n][path] for n in here], layer, by_element, arguments)
            if isinstance(parts[here[0]][path], Replaced):
                continue
            each = [factors_of(parts[n][path], layer) for n in here]
            if by_element is None:
                sum_ = stack(each, w)
                made[path], kept = (sum_, 1.0) if how == "cat" else shorten(sum_, (rank or largest) if how == "svd" else None)
                norm = norm_of(sum_)
            else:
                wanted = by_element([f.dense() for f in each], *arguments)
                made[path], kept = leading(wanted, rank or largest, crc32(path.encode()))
                norm = float(wanted.norm())
            layers[path] = Layer(made[path].rank * made[path].A.shape[0], norm, kept)
    methods = [cast(LoRA, next(iter(part.values())).method) for part in parts.values()]
    bias = next((b for b in ("all", "lora_only") if any(m.bias == b for m in methods)), "none")
    attach(model, plain_lora(model, made, spread, bias, any(m.lora_bias for m in methods)), name)
    return Kept(layers)


def plain_lora(model: nn.Module, made: Mapping[str, Factors], spread: Mapping[str, Mapping[str, Tensor]] = {},
               bias: str = "none", lora_bias: bool = False) -> dict[str, Adapter]:  # fmt: skip
    """LoRA adapters with these factors, attached to nothing yet. `spread` is what they add to biases: path -> "b" or "bias" -> (out,)."""
    everything = dict(modules(model))
    ranks = {path: f.rank * f.A.shape[0] for path, f in made.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != usual}
    method = LoRA(rank=usual, alpha=float(usual), targets=tuple(short_names(model, made)), bias=cast(Any, bias), lora_bias=lora_bias,
                  rank_pattern=odd, alpha_pattern={p: float(r) for p, r in odd.items()})  # fmt: skip
    built: dict[str, Adapter] = {}
    for path in [p for p in everything if p in made or p in spread]:
        module = cast(Site, everything[path])
        own = getattr(module, "bias", None)
        if path in made:
            with torch.device("meta"):  # no random number is drawn
                adapter: Any = method.build(module, path)
            give(adapter, made[path])
        else:
            adapter = Replaced(module, ["bias"])
        moved = spread.get(path, {})
        place = made[path].A.device if path in made else device_of(everything[path])
        for key in ("b", "bias"):
            if adapter._parameters.get(key) is not None:
                start = own.detach().float() if key == "bias" and own is not None else torch.zeros(adapter._parameters[key].shape)
                adapter._parameters[key] = nn.Parameter(start.to(place, copy=True) + moved.get(key, torch.zeros((), device=place)))
        adapter.method = method
        built[path] = adapter
    return built


def norm_of(f: Factors) -> float:
    """‖B A‖, without forming it."""
    Rb, Ra = torch.linalg.qr(f.B, mode="r")[1], torch.linalg.qr(f.A.mT, mode="r")[1]
    return float((Rb @ Ra.mT).norm())


def _biases(parts: Sequence[Any], layer: Site, by_element: Any, arguments: tuple[Any, Any, Any]) -> dict[str, Tensor]:
    """What the parts together add to biases, combined in the same way as the weights; parts without such a bias add nothing."""
    made: dict[str, Tensor] = {}
    weights = arguments[0]
    for key in ("b", "bias"):
        if all(p._parameters.get(key) is None for p in parts):
            continue
        moved = []
        for p in parts:
            own = p._parameters.get(key)
            like = next(q._parameters[key] for q in parts if q._parameters.get(key) is not None)
            if own is None:
                moved.append(torch.zeros_like(like))
            else:
                moved.append(own.detach() * p.scale if key == "b" else own.detach() - cast(Any, layer).bias.detach().float())
        plain_sum = torch.stack([m * w for m, w in zip(moved, weights, strict=True)]).sum(0)
        made[key] = by_element(moved, *arguments) if by_element else plain_sum
    return made


def _checked(names: Sequence[str], weights: Mapping[str, float], how: str, rank: Any, density: Any, majority: str) -> dict[str, float]:
    """The density of each part. Raises WeftError with all that is wrong with the request."""
    wrong = [] if names else ["no part to combine: give them with their weights, as in {'legal': 0.7, 'code': 0.3}"]
    wrong += [f"a weight of {w!r} for {n!r}: a weight is a finite number" for n, w in weights.items() if not _finite(w)]
    ways = get_args(How)
    thins = isinstance(how, str) and how in ways and how not in ("linear", "cat", "svd")
    if how not in ways:
        wrong.append(f"how={how!r}: write one of {', '.join(ways)}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        wrong.append(f"a rank of {rank!r}: a rank is a whole number of at least 1")
    elif rank is not None and how in ("linear", "cat"):
        wrong.append(f"how={how!r} is exact and has the rank that it takes; for a rank of {rank} write how='svd'")
    if majority not in get_args(Majority):
        wrong.append(f"majority={majority!r}: write 'total' or 'frequency'")
    given = {n: density.get(n) for n in names} if isinstance(density, Mapping) else dict.fromkeys(names, density)
    if thins:
        if isinstance(density, Mapping):
            wrong += [f"density names {n!r}, which is no part" for n in density if n not in names]
        missing = [n for n, d in given.items() if d is None]
        if missing:
            wrong.append(f"how={how!r} needs a density, the share of elements to keep" + (
                f"; none for {', '.join(map(repr, missing))}" if isinstance(density, Mapping) else ": density=0.2, say"))  # fmt: skip
        wrong += [f"a density of {d!r}: it is above 0 and at most 1"
                  for d in {d for d in given.values() if d is not None} if not (_finite(d) and 0 < d <= 1)]  # fmt: skip
    elif density is not None and how in ways:
        wrong.append(f"how={how!r} prunes nothing and takes no density")
    if wrong:
        raise WeftError("cannot combine:\n  " + "\n  ".join(wrong) if len(wrong) > 1 else f"cannot combine: {wrong[0]}")
    return {n: float(d) if d is not None else 1.0 for n, d in given.items()}


def _finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(float(x)) < float("inf")


def _check_parts(parts: Mapping[str, Mapping[str, Adapter]], found: Mapping[str, Site]) -> None:
    wrong: dict[str, str] = {}  # one line for each part and class, not one for each layer
    for n, part in parts.items():
        for path, adapter in part.items():
            bias_only = isinstance(adapter, Replaced) and isinstance(adapter.method, LoRA) and {*adapter._parameters} == {"bias"}
            if not is_low_rank(adapter) and not bias_only:
                wrong.setdefault(f"{n} {type(adapter)}", str(refuse(n, path, adapter, found[path])))
            elif bad := [k for k, p in adapter._parameters.items() if p is not None and not torch.isfinite(p).all()]:
                wrong.setdefault(f"{n} finite", f"{n!r} has numbers that are not finite, in {path}.{bad[0]} for one")
    for path in found:
        if len({isinstance(part[path], Replaced) for part in parts.values() if path in part}) > 1:
            wrong[path] = f"{path}: one part trains its bias whole and another adapts the layer; that cannot be one adapter"
    if wrong:
        raise WeftError("\n".join(wrong.values()))

