"""MXFP4 (OCP Microscaling v1.0): 32 weights of e2m1 share an exponent of 8 bits, 4.25 bits a weight. Read only: gpt-oss's experts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.kernels.scratch import real
from weft.quant.formats import Draw, Format, Packed

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class MXFP4(Format):
    """w = level · 2^(scale - 127); the first of two neighbours has the low half of a byte.

    "weight" is uint8 (..., rows, columns / 2) and "scale" uint8 (..., rows, columns / 32). With one dimension more, as gpt-oss's files
    have it, (..., rows, columns / 32, 16), the weight is the transpose: transformers holds those experts as (experts, columns, rows).
    """

    name: ClassVar[str] = "mxfp4"
    writable: ClassVar[bool] = False
    beside = ("scale",)

    def _pack(self, weight: Tensor, draw: Draw | None, **options: Any) -> dict[str, Tensor]:
        raise NotImplementedError("not writable")

    def unpack(self, tensors: Packed, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None, again: bool = False) -> Tensor:
        packed, scale = tensors["weight"], tensors["scale"]
        turned = packed.dim() > len(shape)
        if not real(packed):
            made = _op(packed, scale, turned, dtype, again)
        else:
            made = decode(packed, scale, turned, dtype)
        return made if out is None else out.copy_(made)

    def part(self, tensors: Packed, shape: tuple[int, ...], index: int) -> dict[str, Tensor] | None:
        return {k: t[index] for k, t in tensors.items()} if len(shape) > 2 else None


def decode(packed: Tensor, scale: Tensor, turned: bool, dtype: torch.dtype) -> Tensor:
    """The numbers; exact in bf16 and fp32 but for exponents out of their range."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=packed.device)
    flat = packed.flatten(-2) if turned else packed
    values = levels[torch.stack([flat & 15, flat >> 4], -1).flatten(-2).int()]
    values = torch.ldexp(values.view(*scale.shape, 32), (scale.int() - 127)[..., None]).flatten(-2).to(dtype)
    return values.mT.contiguous() if turned else values


@torch.library.custom_op("weft::dequantise_mxfp4", mutates_args=())
def _op(packed: Tensor, scale: Tensor, turned: bool, dtype: torch.dtype, again: bool) -> Tensor:
    return decode(packed, scale, turned, dtype)


@_op.register_fake
def _(packed, scale, turned, dtype, again):  # type: ignore[no-untyped-def]
    *lead, rows, width = packed.flatten(-2).shape if turned else packed.shape
    return packed.new_empty([*lead, 2 * width, rows] if turned else [*lead, rows, 2 * width], dtype=dtype)
