"""Which layers can be stacked (`weft.step.stacked`): by name, by kind, and by trying whether they are given the very same tensor."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Container
from typing import Any, cast

from torch import Tensor, nn

from weft.core import FAILS, Site, base_class, is_sharded, modules, unmerged
from weft.kernels.stacked import EIGHT
from weft.quant import QuantLinear
from weft.step.check import recomputes
from weft.step.gated import touched, usual
from weft.step.loss import tried
from weft.step.stacked import Stack

logger = logging.getLogger("weft")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def stacks(model: nn.Module, mlps: Container[nn.Module], narrow: Collection[nn.Module] = ()) -> dict[nn.Module, Stack]:
    """The modules some of whose layers can be stacked, and how.

    mlps: the gated ones whose inside is one operation; it has no place for biases. narrow: the layers that may multiply in fp8.
    """
    if recomputes(model):
        return {}  # what the model computes again it computes in the backward pass, when `working` is over and layers are by themselves
    narrow = set(narrow)
    owners = Counter(id(p) for _, m in modules(model) for p in m._parameters.values())
    found: dict[nn.Module, Stack] = {}
    for _, m in modules(model):
        for names in GROUPS:
            layers = [cast(Any, m._modules.get(name)) for name in names]
            if _able(m, layers, narrow) and all(owners[id(one.weight)] == 1 and (m not in mlps or one.bias is None) for one in layers):
                found[m] = Stack(names, layers)
    alike = _same_input(model, found) if found else set()
    return {m: stack for m, stack in found.items() if m in alike}


def _same_input(model: nn.Module, stacks: dict[nn.Module, Stack]) -> set[nn.Module]:
    """Those whose layers are each called once, with one tensor and nothing else."""
    seen: dict[nn.Module, list[Any]] = {layer: [] for stack in stacks.values() for layer in stack.layers}

    def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen[layer].append(() if kwargs else args)  # by name it could not be given to what stands in for the layer

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in seen]
    try:
        tried(model)
    except FAILS as error:
        logger.info("no layers are stacked: %s fails when tried (%s: %s)", type(model).__name__, type(error).__name__, error)
        return set()
    finally:
        for handle in handles:
            handle.remove()

    def same(calls: list[list[Any]]) -> bool:
        return all(len(each) == 1 and len(each[0]) == 1 and each[0][0] is calls[0][0][0] for each in calls)

    return {m for m, stack in stacks.items() if same([seen[layer] for layer in stack.layers])}


def _able(module: nn.Module, layers: list[Any], narrow: Container[nn.Module]) -> bool:
    """Frozen plain layers alike, at least one with LoRA or DoRA, and nobody's hand on them."""
    if getattr(module, "plan", None) is not None or touched(module) or not all(plain(layer, narrow) for layer in layers):
        return False
    kinds = {(layer.in_features, layer.weight.dtype, layer.weight.device, getattr(layer, "dtype", None)) for layer in layers}
    return len(kinds) == 1 and any(getattr(layer, "plan", None) is not None for layer in layers)


def plain(layer: Any, narrow: Container[nn.Module]) -> bool:
    """Whether it is a frozen linear layer, with no adapter or one LoRA or DoRA, and nobody's hand on it."""
    fp8 = layer in narrow
    if layer is None or base_class(layer) is not (QuantLinear if fp8 else nn.Linear) or touched(layer) or unmerged(layer) is not layer:
        return False
    W, b = layer.weight, layer.bias
    if W.requires_grad or is_sharded(W) or type(W.data) is not Tensor or W.is_meta or not W.is_contiguous():
        return False
    if W.dtype.itemsize < 2 and not fp8:
        return False
    if (b is not None and b.requires_grad) or layer.in_features % EIGHT or layer.out_features % EIGHT:
        return False
    return not isinstance(layer, Site) or layer.plan is None or usual(layer)
