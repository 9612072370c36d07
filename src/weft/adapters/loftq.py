"""LoftQ (Li et al. 2023, arXiv:2310.08659): a packed base and a LoRA that starts as what packing lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor, nn

from weft.adapters.attach import adapt, attached
from weft.adapters.combine_algebra import leading
from weft.adapters.targets import find
from weft.core import WeftError, features, is_conv1d, is_linear
from weft.methods.lora import LoRA, LowRank
from weft.quant import candidates, format_of, is_quantised, quantise_, roundtrip

Model = TypeVar("Model", bound=nn.Module)
Parts = Sequence[Tensor]  # B and A of the best approximation of a weight's error


@torch.no_grad()
def loftq_(model: Model, method: LoRA, base: str = "nf4", *, iterations: int = 1, name: str = "default", **options: Any) -> Model:
    """Pack a model's weights in place, as `weft.quant.quantise_` does, and attach a LoRA so that both together are closest to the model.

    Args:
        model: With its weights as numbers; of a packed model nobody knows what was lost.
        method: On linear layers, with init="loftq" or the usual one: A and B are filled here, and the file is a plain LoRA's.
        base: The format. options: Those of the format.
        iterations: T ≥ 1. At 1 the packed base is what `quantise_` makes, which all adapters share. From 2 on it is another one, to
            which this adapter belongs: keep the base with the adapter.
    Raises:
        WeftError: a packed target, another method or start, a target that is no linear layer, T < 1; what `quantise_` and `adapt` raise.
    """
    if iterations < 1:
        raise WeftError(f"loftq_ takes at least one iteration, not {iterations}")
    if options.get("rounding", "nearest") != "nearest":
        raise WeftError("loftq_ makes up for what packing loses, and rounding by chance loses something else each time: leave rounding out")
    found = _targets(model, method)
    factors: dict[str, Parts] = {}
    for path, layer in found.items():
        left, *factors[path] = alternate(layer.weight.float(), method.scaled(path)[0], base, iterations, path=path, **options)
        layer.weight.copy_(left)
    quantise_(model, base, **options)
    _attach(model, method, name, factors)
    return model


class Lost:
    """What packing loses of the targets of a LoRA, taken down while a base is loaded and packed: `load_base(..., on_packed=lost)`.

    So the whole model is never there in 16 bits. One iteration of `loftq_`, to the same numbers.

    Args:
        frame: The model without its weights (`weft.models.skeleton`). method: As for `loftq_`.
    Raises:
        WeftError: as `loftq_`, before anything is loaded.
    """

    def __init__(self, frame: nn.Module, method: LoRA) -> None:
        self.method, self.found = method, _targets(frame, method)
        self.factors: dict[str, Parts] = {}

    @torch.no_grad()
    def __call__(self, name: str, values: Tensor, base: str, tensors: Mapping[str, Tensor]) -> None:
        path = name.rpartition(".")[0]
        if path in self.found and name == f"{path}.weight":
            W = values.to(next(iter(tensors.values())).device, torch.float32)
            off = W - format_of(base).unpack(tensors, W.shape, torch.float32)
            self.factors[path] = best(off, self.method.scaled(path)[0], path)

    @torch.no_grad()
    def attach(self, model: nn.Module, name: str) -> None:
        """Attach the LoRA to the base that was loaded."""
        _attach(model, self.method, name, self.factors)


def _targets(model: nn.Module, method: LoRA) -> dict[str, Any]:
    """The layers that the method means. Raises WeftError for all of them that LoftQ cannot begin."""
    if type(method) is not LoRA or method.init not in ("kaiming", "loftq"):
        raise WeftError('LoftQ takes a weft.LoRA with init="loftq" or the usual one')
    found = cast("dict[str, Any]", find(model, method))
    wrong = [f"{p} is no linear layer" for p, m in found.items() if not is_linear(m)]
    wrong += [f"{p} is packed already: load the model in 16 bits" for p, m in found.items() if is_quantised(m)]
    packs = {p for p, _ in candidates(model)}
    wrong += [f"{p} would not be packed: exclude={p!r} in the method" for p, m in found.items() if p not in packs and not is_quantised(m)]
    many = {p: method.scaled(p)[0] for p, m in found.items() if is_linear(m) and method.scaled(p)[0] > min(features(m))}
    wrong += [f"{p} has {min(features(found[p]))} directions at most, and the rank is {r}" for p, r in many.items()]
    if wrong:
        raise WeftError("LoftQ needs linear layers with their weights as numbers:\n  " + "\n  ".join(wrong[:6]))
    return found


def _attach(model: nn.Module, method: LoRA, name: str, factors: Mapping[str, Parts]) -> None:
    adapt(model, replace(method, init="kaiming"), name=name)
    for path, adapter in attached(model, name).items():
        if isinstance(adapter, LowRank):
            B, A = factors[path]
            B, A = (A.T, B.T) if is_conv1d(model.get_submodule(path)) else (B, A)
            adapter.B.copy_(B)
            adapter.A.copy_(A / adapter.scale)


def alternate(
    W: Tensor, rank: int, base: str, iterations: int, *, exact: bool = False, path: str = "", **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(what to pack, B, A): Qₜ = q(W - Bₜ₋₁Aₜ₋₁), and BₜAₜ the best approximation of W - Qₜ at that rank (algorithm 1).

    `exact` takes the whole decomposition, which costs more. Both give the same numbers whenever they are asked.
    """
    B, A = W.new_zeros(W.shape[0], rank), W.new_zeros(rank, W.shape[1])
    left = W
    for _ in range(iterations):
        left = W - B @ A
        B, A = best(W - roundtrip(left, base, **options), rank, path, exact)
    return left, B, A


def best(off: Tensor, rank: int, path: str, exact: bool = False) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) of the best approximation BA of an error (out, in)."""
    if exact:
        U, S, Vh = torch.linalg.svd(off, full_matrices=False)
        root = S[:rank].sqrt()
        return U[:, :rank] * root, root[:, None] * Vh[:rank]
    made, _ = leading(off[None], rank, crc32(path.encode()))
    return made.B[0], made.A[0]
