"""y = x Wᵀ for a few tokens, from a packed W whose bytes are read once: generating, where decoding costs several times the product.

    y_tn = Σ_g s_ng Σ_{k in g} x_tk · value(q_nk)        g: 32 neighbours, which have one scale; sums in fp32, in a fixed order
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.kernels.eight_bit import dequantise_8bit_reference, tiles
from weft.kernels.four_bit import block_size, dequantise_4bit_reference, dynamic, table
from weft.kernels.launch import kernels, usable
from weft.kernels.scratch import real

FEW = 16  # tokens up to which the bytes are multiplied directly (bench/few_tokens.py)
FEW_WIDE = 4  # of fp32, which no tensor core multiplies exactly: token by token
GROUP = 32
_PLAIN = (Tensor, torch.nn.Parameter)


def fits(x: Tensor, inputs: int) -> bool:
    """Whether x (..., inputs) is for these kernels: few tokens of 16 or 32 bits, and rows of W that are whole groups."""
    if not usable(x) or inputs % GROUP or (not torch.compiler.is_compiling() and type(x) not in _PLAIN):
        return False
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return False  # Triton's interpreter multiplies the bits of bf16 as whole numbers
    most = FEW if x.dtype in (torch.bfloat16, torch.float16) else FEW_WIDE if x.dtype == torch.float32 else 0
    return 0 < prod(x.shape[:-1]) <= most


def linear_4bit_reference(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, kind: str, outputs: int
) -> Tensor:
    """The same in plain operations: decode to fp32 and multiply."""
    W = torch.empty(outputs, x.shape[-1], device=x.device)
    return F.linear(x.float(), dequantise_4bit_reference(packed, absmax, nested_absmax, nested_offset, kind, W)).to(x.dtype)


def linear_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, kind: str, outputs: int
) -> Tensor:
    """x Wᵀ (..., outputs) in x's dtype; no gradient.

    Args:
        x: (..., inputs), such that `fits`. packed, absmax, nested_absmax, nested_offset, kind: As `dequantise_4bit` has them.
    """
    if not real(x):
        return _four(x, packed, absmax, nested_absmax, nested_offset, kind, outputs)  # type: ignore[no-any-return]
    return _launch(x, outputs, *operands_4bit(packed, absmax, nested_absmax, nested_offset, kind, outputs, x.shape[-1]))


def linear_8bit_reference(x: Tensor, packed: Tensor, scale: Tensor, outputs: int) -> Tensor:
    """The same in plain operations: decode to fp32 and multiply."""
    W = torch.empty(outputs, x.shape[-1], device=x.device)
    return F.linear(x.float(), dequantise_8bit_reference(packed.view(W.shape), scale, W)).to(x.dtype)


def linear_8bit(x: Tensor, packed: Tensor, scale: Tensor, outputs: int) -> Tensor:
    """x Wᵀ (..., outputs) in x's dtype; no gradient. x: (..., inputs), such that `fits`. packed, scale: As `dequantise_8bit` has them."""
    if not real(x):
        return _eight(x, packed, scale, outputs)  # type: ignore[no-any-return]
    return _launch(x, outputs, *operands_8bit(packed, scale, outputs, x.shape[-1]))


def operands_4bit(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, kind: str, outputs: int, inputs: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernels are given for W (outputs, inputs), and what they are compiled for."""
    nested = nested_absmax is not None and nested_offset is not None
    second, offset = (nested_absmax, nested_offset) if nested else (absmax, absmax)
    shift = block_size(outputs * inputs, absmax.numel()).bit_length() - 1
    args = (packed, absmax, dynamic(packed.device), second, offset, table(kind, packed.device), inputs // 2, shift, 1, 1, 1)
    return args, {"FOUR": True, "NESTED": nested}


def operands_8bit(packed: Tensor, scale: Tensor, outputs: int, inputs: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same for one byte a weight."""
    across = 1 if scale.numel() == 1 else scale.shape[-1]
    args = (packed, scale, scale, scale, scale, table("nf4", packed.device), inputs, 0, *tiles((outputs, inputs), scale), across)
    return args, {"FOUR": False, "NESTED": False}


def _launch(x: Tensor, outputs: int, args: tuple[Any, ...], meta: dict[str, Any]) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(flat), outputs)
    work = kernels("triton_few_tokens")
    (work.one_token if len(flat) == 1 or x.dtype == torch.float32 else work.few_tokens)(flat, args, y, meta)
    return y.view(*x.shape[:-1], outputs)


@torch.library.custom_op("weft::linear_4bit", mutates_args=())
def _four(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, kind: str, outputs: int
) -> Tensor:
    return linear_4bit(x, packed, absmax, nested_absmax, nested_offset, kind, outputs)


@torch.library.custom_op("weft::linear_8bit", mutates_args=())
def _eight(x: Tensor, packed: Tensor, scale: Tensor, outputs: int) -> Tensor:
    return linear_8bit(x, packed, scale, outputs)


@_four.register_fake
@_eight.register_fake
def _(x, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rest[-1])
