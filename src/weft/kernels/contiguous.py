"""A contiguous copy that a compiler keeps contiguous.

Inductor (torch 2.11, 2.13) lays the result of `to(dtype).contiguous()` out like its input where the reader states no wish, and its
grouped products state none, though they need rows or columns without gaps: "Invalid strides/sizes" at the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def contiguous(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t as `dtype`, its last dimension the fastest."""
    if torch.compiler.is_compiling():
        made: Tensor = _op(t, dtype)
        return made
    return t.to(dtype, memory_format=torch.contiguous_format).contiguous()  # `to` leaves what has the dtype as it lies


@torch.library.custom_op("weft::contiguous", mutates_args=())
def _op(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype, copy=True, memory_format=torch.contiguous_format)


@_op.register_fake
def _(t, dtype):  # type: ignore[no-untyped-def]
    return t.new_empty(t.shape, dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return g.to(ctx.dtype), None


_op.register_autograd(_backward, setup_context=_remember)
