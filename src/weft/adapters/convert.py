"""Any adapter that is a change of weights, made into a plain LoRA."""

from __future__ import annotations

from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn

from weft.adapters.attach import attach, attached, check_new
from weft.adapters.combine import Kept, Layer, norm_of, plain_lora
from weft.adapters.combine_algebra import Factors, factors_of, is_low_rank, leading, reaching, shorten
from weft.core import WeftError, is_conv, is_conv1d, is_linear, masters, sites
from weft.core.layers import numbers


def convert(model: nn.Module, name: str, rank: int | None = None, to: str | None = None, *, energy: float | None = None) -> Kept:
    """Make a plain LoRA of an adapter of any method that can be merged, and let it alone work. The adapter itself stays as it is.

    Each layer's ΔW = W_merged - W is approximated as well as its rank allows: exactly where the method's update is of that rank (a LoRA of
    any initialisation and scale; what is trained against changed starting factors has twice its rank).

    Args:
        name: The adapter to convert.
        rank: Of the LoRA (16 if neither this nor `energy` is given).
        to: The name of the LoRA; None: the adapter's with "-lora" behind it.
        energy: In place of a rank: the share of ‖ΔW‖² to keep in each layer, above 0 and at most 1; each layer gets the rank that it takes.
    Returns:
        The share kept, by layer; its notes name parameters that changed and that no LoRA holds (norms, say).
    Raises:
        WeftError: a method that is no change of weights, an unknown name, a rank or energy that makes no sense, nothing left to hold.
    """
    to = f"{name}-lora" if to is None else to
    found = attached(model, name)
    check_new(model, to)
    check_rank(rank, energy)
    here = sites(model)
    wrong = [f"{p}: {r}" for p, a in found.items() if not is_low_rank(a) and (r := a.unmergeable(here[p]))]
    kinds = {type(a.method) for a in found.values()}
    wrong += [f"a {k.__name__} is no change of weights" for k in kinds if not k.mergeable]
    if wrong:
        raise WeftError(f"{name!r} cannot be converted:\n  " + "\n  ".join(wrong))
    made: dict[str, Factors] = {}
    layers: dict[str, Layer] = {}
    spread: dict[str, dict[str, Tensor]] = {}
    notes: list[str] = []
    with torch.no_grad():
        for path, adapter in found.items():
            layer: Any = here[path]
            if is_low_rank(adapter) and energy is None:
                own = factors_of(adapter, here[path])
                made[path], kept = shorten(own, rank or 16)
                norm = norm_of(own)
                layers[path] = Layer(made[path].rank * made[path].A.shape[0], norm, kept)
            new = {} if getattr(layer, "groups", 1) > 1 else masters(adapter).merged(here[path])
            for key, value in new.items():
                before = numbers(layer, key).float() if layer._parameters.get(key) is not None or key == "weight" else None
                change = value - before if before is not None else value
                if key == "bias" and (is_linear(layer) or (is_conv(layer) and before is not None)):
                    if change.any():
                        spread.setdefault(path, {})["bias" if before is not None else "b"] = change
                elif key == "weight" and holdable(layer):
                    if path not in made and change.any():
                        made[path], layers[path] = approximate(matrix(change, layer), rank, energy, path)
                elif change.any():
                    notes.append(changed(f"{path}.{key}", change, before))
    for path in [p for p in spread if p not in made]:
        del spread[path]
        notes.append(f"{path}.bias changed, and its weight did not: left out")
    if not made:
        raise WeftError(f"{name!r} holds no change of a linear layer, embedding or convolution, so no LoRA can hold it")
    keys = {key for part in spread.values() for key in part}
    attach(model, plain_lora(model, made, spread, "lora_only" if "bias" in keys else "none", "b" in keys), to)
    return Kept(layers, tuple(notes))


def check_rank(rank: object, energy: object) -> None:
    """Raise WeftError unless there is a sensible rank or energy, or neither."""
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise WeftError(f"a rank of {rank!r}: a rank is a whole number of at least 1")
    if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise WeftError(f"energy={energy!r}: the share of ‖ΔW‖² to keep is above 0 and at most 1")
    if rank is not None and energy is not None:
        raise WeftError("give a rank or an energy, not both")


def holdable(layer: object) -> bool:
    """Whether a LoRA can hold a change of this layer's weight."""
    return is_linear(layer) or isinstance(layer, nn.Embedding) or (is_conv(layer) and cast(Any, layer).groups == 1)


def matrix(change: Tensor, layer: object) -> Tensor:
    """(1, out, in) of a change of weight in the layer's own layout."""
    turned = is_conv1d(layer) or isinstance(layer, nn.Embedding)
    return (change.T if turned else change.flatten(1))[None]


def approximate(wanted: Tensor, rank: int | None, energy: float | None, path: str) -> tuple[Factors, Layer]:
    """The factors for one dense update (1, out, in), by rank or by energy, and what they keep."""
    seed = crc32(path.encode())
    made, kept = reaching(wanted, energy, seed) if energy is not None else leading(wanted, rank or 16, seed)
    return made, Layer(made.rank, float(wanted.norm()), kept)


def changed(what: str, change: Tensor, before: Tensor | None) -> str:
    """A note on a parameter that changed and that no LoRA holds."""
    size = f" by {float(change.norm() / before.norm().clamp_min(1e-30)):.2g} of its norm" if before is not None else ""
    return f"{what} changed{size}, which no LoRA holds"
