"""LoftQ (Li et al. 2023, arXiv:2310.08659): a packed base and a LoRA that starts as what packing lost."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from weft.adapters.attach import adapt, attached
from weft.adapters.targets import find
from weft.core import WeftError, is_conv1d, is_linear
from weft.methods.lora import LoRA, LowRank
from weft.quant import candidates, is_quantised, quantise_, roundtrip

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def loftq_(model: Model, method: LoRA, base: str = "nf4", *, iterations: int = 1, name: str = "default", **options: Any) -> Model:
    """Pack a model's weights in place, as `weft.quant.quantise_` does, and attach a LoRA so that both together are closest to the model.

    Args:
        model: With its weights as numbers; of a packed model nobody knows what was lost.
        method: On linear layers, with the usual start ("kaiming"): A and B are filled here.
        base: The format. options: Those of the format.
        iterations: T ≥ 1. At 1 the packed base is what `quantise_` makes, which all adapters share. From 2 on it is another one, to
            which this adapter belongs: keep the base with the adapter.
    Raises:
        WeftError: a packed target, another method or start, a target that is no linear layer, T < 1; what `quantise_` and `adapt` raise.
    """
    if type(method) is not LoRA or method.init != "kaiming" or iterations < 1:
        raise WeftError("loftq_ takes a weft.LoRA with its usual init, and at least one iteration")
    if options.get("rounding", "nearest") != "nearest":
        raise WeftError("loftq_ makes up for what packing loses, and rounding by chance loses something else each time: leave rounding out")
    found = cast("dict[str, Any]", find(model, method))
    wrong = [f"{p} is no linear layer" for p, m in found.items() if not is_linear(m)]
    wrong += [f"{p} is packed already: load the model in 16 bits" for p, m in found.items() if is_quantised(m)]
    packs = {p for p, _ in candidates(model)}
    wrong += [f"{p} would not be packed: exclude={p!r} in the method" for p, m in found.items() if p not in packs and not is_quantised(m)]
    if wrong:
        raise WeftError("LoftQ needs linear layers with their weights as numbers:\n  " + "\n  ".join(wrong[:6]))
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in found.items():
        W = layer.weight.float()
        rank, scale = method.scaled(path)
        left, B, A = alternate(W, rank, base, iterations, **options)
        layer.weight.copy_(left)
        factors[path] = (B, A / scale) if not is_conv1d(layer) else (A.T, B.T / scale)
    quantise_(model, base, **options)
    adapt(model, method, name=name)
    for path, adapter in attached(model, name).items():
        if isinstance(adapter, LowRank):
            adapter.B.copy_(factors[path][0])
            adapter.A.copy_(factors[path][1])
    return model


def alternate(W: Tensor, rank: int, base: str, iterations: int, *, exact: bool = False, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(what to pack, B, A): Qₜ = q(W - Bₜ₋₁Aₜ₋₁), and BₜAₜ the best approximation of W - Qₜ at that rank (algorithm 1).

    `exact` takes the whole decomposition, which costs more and draws nothing at random: the same again each time.
    """
    B, A = W.new_zeros(W.shape[0], rank), W.new_zeros(rank, W.shape[1])
    left = W
    for _ in range(iterations):
        left = W - B @ A
        lost = W - roundtrip(left, base, **options)
        if exact:
            U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(lost, q=min(2 * rank, *W.shape), niter=4)
            Vh = V.T
        root = S[:rank].sqrt()
        B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return left, B, A
