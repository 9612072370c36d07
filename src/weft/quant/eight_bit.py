"""int8 and fp8 (e4m3): a byte for each weight, and a scale for each row or each 128 × 128 tile."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.core import WeftError
from weft.kernels.eight_bit import TILE, dequantise_8bit
from weft.kernels.few_tokens import fits, linear_8bit
from weft.quant.formats import ROUNDING, Draw, Format, Packed


class EightBit(Format):
    """What they share: "weight" has the shape of the weight (`stored`, or its bytes), "scale" is fp32, and w = q · scale."""

    beside = ("scale",)
    defaults: ClassVar[dict[str, Any]] = ROUNDING
    stored: ClassVar[torch.dtype]
    largest: ClassVar[float]  # the largest number that a byte can be
    tiled: ClassVar[bool] = False

    def _pack(self, weight: Tensor, draw: Draw | None, **options: Any) -> dict[str, Tensor]:
        if weight.dim() < 2:
            raise WeftError(f"{self.name} has a scale for each row, and a weight of shape {tuple(weight.shape)} has no rows")
        w = weight.float()
        scale = (_tile_max(w) if self.tiled else w.abs().amax(-1, keepdim=True)) / self.largest
        full = scale
        if self.tiled:
            full = scale.repeat_interleave(TILE, -2)[..., : w.shape[-2], :].repeat_interleave(TILE, -1)[..., : w.shape[-1]]
        q = torch.where(full > 0, w / full, 0.0).clamp_(-self.largest, self.largest)
        return {"weight": (self.nearest(q) if draw is None else self.either(q, draw)).to(self.stored), "scale": scale}

    def nearest(self, q: Tensor) -> Tensor:
        """Numbers in ±`largest` to what the bytes can be, which casting may still have to do."""
        return q

    def either(self, q: Tensor, draw: Draw) -> Tensor:
        """To one of the two neighbours, so that the mean is q."""
        step = self.step(q)
        low = (q / step).floor_()
        return (low + (draw(q) < q / step - low)) * step

    def step(self, q: Tensor) -> Tensor | float:
        """How far apart the levels on both sides of each number are."""
        return 1.0

    def unpack(self, tensors: Packed, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None, again: bool = False) -> Tensor:
        return dequantise_8bit(tensors["weight"].view(self.stored), tensors["scale"], tuple(shape), dtype, out, again)

    def product(self, tensors: Packed, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
        return linear_8bit(x, tensors["weight"].view(self.stored), tensors["scale"], shape[0]) if fits(x, shape[1]) else None

    def part(self, tensors: Packed, shape: tuple[int, ...], index: int) -> dict[str, Tensor] | None:
        if len(shape) < 3:
            return None
        scale = tensors["scale"]
        return {"weight": tensors["weight"][index], "scale": scale[index] if scale.dim() == len(shape) else scale}


class Int8(EightBit):
    """Whole numbers -127 to 127 and a scale for each row: w = q · absmax / 127. Error on normal weights of 4096 a row: 0.9%."""

    name: ClassVar[str] = "int8"
    stored, largest = torch.int8, 127.0

    def nearest(self, q: Tensor) -> Tensor:
        return q.round_()


class FP8(EightBit):
    """8-bit floats (e4m3, at most 448) with a scale for each row."""

    name: ClassVar[str] = "fp8"
    stored, largest = torch.float8_e4m3fn, 448.0

    def step(self, q: Tensor) -> Tensor:
        exponent = torch.frexp(q).exponent  # 2^(exponent - 1) ≤ |q|; three bits of mantissa, and below 2^-6 the steps stay as they are
        return torch.ldexp(torch.ones_like(q), (exponent - 4).clamp_(min=-9))


class FP8Block(FP8):
    """8-bit floats with a scale for each 128 × 128 tile, as DeepSeek's and Qwen's checkpoints have them."""

    name: ClassVar[str] = "fp8-block"
    tiled = True


def _tile_max(w: Tensor) -> Tensor:
    """(..., ⌈rows/128⌉, ⌈columns/128⌉) the largest size in each tile."""
    rows, columns = w.shape[-2:]
    padded = F.pad(w.abs(), (0, -columns % TILE, 0, -rows % TILE))
    *lead, rows, columns = padded.shape
    return padded.view(*lead, rows // TILE, TILE, columns // TILE, TILE).amax((-3, -1))
