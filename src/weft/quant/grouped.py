"""A mixture's experts all at once: one launch for the products of a parameter with all tokens, which lie expert after expert.

Of packed weights one parameter at a time is decoded, and none is kept for the backward pass, which decodes it again. The numbers are in
fresh memory: a shared buffer would hold a layer's largest parameter (0.8 GB for Qwen3-30B-A3B) for good, twice with the backward pass's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.core import logical
from weft.quant.experts import is_packed, product_dtype, projections, through
from weft.quant.layers import decode, slots

Add = Callable[[str, Tensor, Tensor, Tensor], Tensor]  # (parameter, ends, x, y) -> y with what an adapter adds
ALIGNED = 8  # rows of 16-bit numbers begin at multiples of 16 bytes if their lengths are multiples of this


def has_grouped_products(device: torch.device) -> bool:
    """Whether torch multiplies groups of different sizes on this device in one launch."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


# What `torch.compiler.assume_constant_result` sets, which imports all of the compiler for it (0.8 s).
has_grouped_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def groupable(module: Any, x: Tensor) -> bool:
    """Whether `grouped` can compute x through experts that are `routable`, compiled or not, and is the fastest way to do so.

    Experts of other processes are none of its business: rows beyond the last group hold whatever the memory held.
    """
    if getattr(module, "_is_expert_parallel", False) or not has_grouped_products(x.device):
        return False
    for name in projections(module):
        shape, dtype = logical(module, name)
        if not is_packed(module, name) and dtype != torch.bfloat16:
            return False
        if product_dtype(module, name, x) != torch.bfloat16 or any(n % ALIGNED for n in shape[1:]):
            return False
    return True


def grouped(module: Any, x: Tensor, chosen: Tensor, weights: Tensor, add: Add | None = None) -> Tensor:
    """What the experts make of x.

    Args:
        x: (tokens, width). chosen: (tokens, k), each token's experts, all of them here. weights: (tokens, k), the router's.
        add: What to add to the products; `ends` is (experts,) int32, the row after each expert's last one.
    """
    owners, order = chosen.flatten().sort(stable=True)  # what is computed again must find the same order as what was kept
    ends = torch.searchsorted(owners, torch.arange(module.num_experts, device=x.device), right=True).to(torch.int32)

    def each(name: str, x: Tensor) -> Tensor:
        x = x.to(product_dtype(module, name, x))
        y = _product(module, name, x, ends)
        if module.has_bias:
            y = y + getattr(module, f"{name}_bias")[owners].to(y.dtype)
        return y if add is None else add(name, ends, x, y)

    return through(module, each, x, order, chosen, weights)


def _product(module: Any, name: str, x: Tensor, ends: Tensor) -> Tensor:
    """x W_eᵀ with W = parameter, each token by its own expert's."""
    if is_packed(module, name):
        held = slots(module.form, module.tensors(name))
        made: Tensor = GroupedProduct.apply(x, ends, module.form.name, module.shapes[name], module.is_transposed, *held)  # type: ignore[no-untyped-call]
        return made
    W = module._parameters[name].detach()
    return F.grouped_mm(x, W if module.is_transposed else W.mT, offs=ends)


class GroupedProduct(torch.autograd.Function):
    """x W_eᵀ, or x W_e where the module holds W turned, with all W_e from their packed tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ends: Tensor, base: str, shape: torch.Size, turned: bool, weight: Tensor, first: Tensor | None,
        second: Tensor | None, third: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(ends, weight, first, second, third)
        ctx.base, ctx.shape, ctx.turned = base, shape, turned
        W = decode(base, shape, (weight, first, second, third), x.dtype)
        return F.grouped_mm(x, W if turned else W.mT, offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        ends, *held = ctx.saved_tensors
        W = decode(ctx.base, ctx.shape, held, g.dtype, again=True)
        return F.grouped_mm(g.contiguous(), W.mT if ctx.turned else W, offs=ends), *[None] * 8
