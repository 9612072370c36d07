"""A mixture's experts, computed one after another on the tokens that the router sent to each.

    y = Σ_e p_e · V_e act(W_e x)

Of packed weights one expert at a time is decoded, and none is kept for the backward pass. What a module must promise for this is
transformers' contract for experts (`use_experts_implementation`), under which a forward that is not the module's own computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.core import base_class
from weft.kernels.scratch import real
from weft.quant.layers import Product, Quantised, slots

Add = Callable[[str, int, Tensor, Tensor], Tensor]  # (parameter, expert, x, y) -> y with what an adapter adds; may write into y
_PROMISED = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")


def routable(module: Any, names: Collection[str], inputs: Sequence[Any]) -> bool:
    """Whether `routed` and `grouped` may stand for this call: the module keeps the contract, and `names` are its projections."""
    own: Any = getattr(base_class(module), "own", base_class(module))  # the class from before its parameters were packed
    if not (hasattr(own.forward, "__wrapped__") and all(n in module.__dict__ for n in _PROMISED)):
        return False
    if len(inputs) != 3 or not all(isinstance(t, Tensor) and t.dim() == 2 for t in inputs):
        return False
    return set(names) <= set(projections(module))


def projections(module: Any) -> tuple[str, str]:
    """The parameters on the way in and on the way out of an expert."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def routed(module: Any, x: Tensor, chosen: Tensor, weights: Tensor, add: Add | None = None) -> Tensor:
    """What the experts make of x.

    Args:
        x: (tokens, width). chosen: (tokens, k), each token's experts; numbers of `num_experts` and above belong to other processes.
        weights: (tokens, k), the router's. add: What to add to each expert's products.
    """
    owners, order = chosen.flatten().sort()
    counts = torch.bincount(owners, minlength=module.num_experts)[: module.num_experts].tolist()
    order = order[: sum(counts)]
    if not len(order):
        return torch.zeros_like(x)
    return through(module, lambda name, h: _each(module, name, h, counts, add), x, order, chosen, weights)


def through(
    module: Any, each: Callable[[str, Tensor], Tensor], x: Tensor, order: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The way through the experts; `each` is the product of one of the parameters with tokens that lie expert after expert, in `order`."""
    first, second = projections(module)
    h = each(first, x[order // chosen.shape[1]])
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    h = each(second, h)
    if getattr(module, "has_post_expert_norm", False):
        h = module.post_expert_norm(h)
    h = h * weights.flatten()[order, None]
    back = h.new_zeros(chosen.numel(), h.shape[1]).index_copy(0, order, h)  # summed in a fixed order, as index_add on a card is not
    return back.view(*chosen.shape, -1).sum(1).to(x.dtype)


def _each(module: Any, name: str, x: Tensor, counts: Sequence[int], add: Add | None) -> Tensor:
    """W_e x + b_e of all tokens, which lie expert after expert, counts[e] for expert e."""
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    out = []
    for e, part in enumerate(torch.split(x, list(counts))):
        if not len(part):
            continue
        y = _product(module, name, e, part)
        if bias is not None:
            y = y + bias[e].to(y.dtype)
        out.append(y if add is None else add(name, e, part, y))
    return torch.cat(out)


def _product(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """x Wᵀ with W = parameter[expert], in fresh memory."""
    if not is_packed(module, name):
        W = module._parameters[name].detach()[expert]
        return F.linear(x.to(W.dtype), W.mT if module.is_transposed else W)
    part = module.form.part(module.tensors(name), module.shapes[name], expert)
    x, shape = x.to(product_dtype(module, name, x)), module.shapes[name][1:]
    return Product.apply(x, module.form.name, shape, module.is_transposed, *slots(module.form, part))  # type: ignore[no-any-return, no-untyped-call]


def product_dtype(module: Any, name: str, x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied with a parameter: a plain one's own, a packed one's is x's; under autocast, autocast's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return in_dtype(module, (x,)) if is_packed(module, name) else module._parameters[name].dtype


def in_dtype(module: Quantised, inputs: Sequence[Any]) -> torch.dtype:
    """What a layer decodes to: the dtype of its input, as a linear layer does; under autocast, or without such an input, its own."""
    x = inputs[0] if inputs else None
    if not isinstance(x, Tensor) or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return module.dtype
    return x.dtype


def is_packed(module: Any, name: str) -> bool:
    """Whether a parameter of any module holds packed bytes."""
    return isinstance(module, Quantised) and module.is_packed(name)


def _separable(module: Any, name: str) -> bool:
    """Whether one expert can be had without the others: no block of the format straddles two of them."""
    return not is_packed(module, name) or module.form.part(module.tensors(name), module.shapes[name], 0) is not None


def one_by_one_pays(module: Any, x: Tensor) -> bool:
    """Whether `routed` can compute x through experts that are `routable`, and is the fastest way; it always takes the least memory.

    On a CPU it is, whether all experts are hit or few (bench/results/experts.json). On a card many small launches cost more than they save.
    """
    return x.device.type == "cpu" and real(x) and all(_separable(module, name) for name in projections(module))
