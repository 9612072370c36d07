"""nf4 and fp4: blocks of 4-bit codes, with or without double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Where bitsandbytes' own devices differ, the rule is that of its CUDA kernels: a weight is multiplied with 1/absmax and compared with fp32
thresholds; a tie goes to the lower level; a block of zeros has code 0 throughout; FP4 takes the sign from the sign bit's meaning "below 0";
a scale takes the nearest value of the dynamic map.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.kernels.few_tokens import fits, linear_4bit
from weft.kernels.four_bit import NESTED, NF4, TABLES, block_size, dequantise_4bit, dynamic, scales, table
from weft.quant.formats import ROUNDING, Draw, Format, Packed

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SEARCH = tuple(0.8 + 0.02 * i for i in range(21))  # scales tried by quant_scale="mse", in units of absmax
_STRIDE = 1 << 22  # weights quantised at once: 16 MiB of fp32, so that a large tensor never stands beside several copies of itself
# FP4 by size (0, 0.0052, 1/6, 1/4, 1/3, 1/2, 2/3, 1): codes, and the borders between, to the digits of bitsandbytes' kernels.
_FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)
_FP4_BORDERS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


@cache
def _borders(kind: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        if kind == "fp4":
            return torch.tensor(_FP4_BORDERS, dtype=torch.float32).to(device)
        levels = torch.tensor(NF4 if kind == "nf4" else dynamic(torch.device("cpu")).tolist(), dtype=torch.float32)
        return ((levels[1:] + levels[:-1]) / 2).to(device)


def codes(x: Tensor, scale: Tensor, kind: str, draw: Draw | None = None) -> Tensor:
    """(blocks, block) fp32 weights and (blocks, 1) scales to (blocks, block) codes 0..15, uint8.

    draw: choose between the two neighbouring levels by chance, so that the mean is the weight.
    """
    normal = x * (1 / scale)  # NaN in a block of zeros, which is above no border
    size = torch.where(normal.isnan(), -1.0, normal) if kind == "nf4" else torch.where(normal.isnan(), 0.0, normal.abs())
    if draw is None:
        place = torch.bucketize(size, _borders(kind, x.device), out_int32=True)
    else:
        levels = table(kind, x.device)
        levels = levels if kind == "nf4" else levels[list(_FP4_CODES)]
        place = (torch.bucketize(size, levels, out_int32=True, right=True) - 1).clamp_(0, len(levels) - 2)
        low, high = levels[place], levels[place + 1]
        place += draw(size) < (size - low) / (high - low)
    if kind == "nf4":
        return place.to(torch.uint8)
    code = torch.tensor(_FP4_CODES, dtype=torch.uint8, device=x.device)[place]
    return code | ((normal < 0).to(torch.uint8) << 3)


def nest(absmax: Tensor, up: bool = False) -> dict[str, Tensor]:
    """Double quantisation: (blocks,) fp32 scales to a byte each, with an offset (their mean) and a second scale for every 256.

    up: each to the next larger scale, so that no weight lies beyond the outermost levels.
    """
    offset = absmax.mean()
    rest = F.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    second = rest.abs().amax(1)
    normal = (rest * (1 / second)[:, None]).masked_fill(second[:, None] == 0, 0.0)
    borders = dynamic(absmax.device)[:-1] if up else _borders("dynamic", absmax.device)
    code = torch.bucketize(normal, borders, out_int32=True).to(torch.uint8)
    return {"absmax": code.view(-1)[: len(absmax)].clone(), "nested_absmax": second, "nested_offset": offset}


class FourBit(Format):
    """Both 4-bit formats; they differ in their 16 levels.

    Options:
        block: Weights that share a scale, one of 32 to 4096.
        nested: Double quantisation: the scales are bytes themselves. At a block of 64: 4.127 bits a weight instead of 4.5.
        quant_scale: "absmax", byte for byte bitsandbytes' own, or "mse": the scale of each block that leaves the least squared error of 21
            between 0.8 and 1.2 of it. The file is of the same form.
        rounding, seed: See `Format.pack`. Stochastic rounding takes absmax, and with double quantisation the next larger scale.
    """

    beside = ("absmax", "nested_absmax", "nested_offset")
    defaults: ClassVar[dict[str, Any]] = {"block": 64, "nested": True, "quant_scale": "absmax", **ROUNDING}

    def _wrong(self, options: dict[str, Any]) -> list[str]:
        wrong = super()._wrong(options)
        if options["block"] not in BLOCKS or isinstance(options["block"], bool):
            wrong.append(f"block={options['block']!r} is no block size of {self.name}: choose one of {', '.join(map(str, BLOCKS))}")
        if not isinstance(options["nested"], bool):
            wrong.append(f"nested={options['nested']!r} is neither True nor False")
        if options["quant_scale"] not in ("absmax", "mse"):
            wrong.append(f"quant_scale={options['quant_scale']!r} is neither 'absmax' nor 'mse'")
        elif options["quant_scale"] == "mse" and options["rounding"] == "stochastic":
            wrong.append("quant_scale='mse' cuts the largest weights off, so their mean is not kept: rounding='stochastic' wants absmax")
        return wrong

    def _pack(  # type: ignore[override]
        self, weight: Tensor, draw: Draw | None, *, block: int, nested: bool, quant_scale: str
    ) -> dict[str, Tensor]:
        flat, numel = weight.reshape(-1), weight.numel()
        blocks = -(-numel // block)
        absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
        for piece, mine in _pieces(flat, block):
            absmax[mine] = _best(piece, self.name) if quant_scale == "mse" else piece.abs().amax(1)
        found = nest(absmax, up=draw is not None) if nested else {"absmax": absmax}
        scale = absmax  # bitsandbytes encodes with the exact scale; a search, and a mean, need the one that is really stored
        if quant_scale == "mse" or draw is not None:
            scale = scales(found["absmax"], found.get("nested_absmax"), found.get("nested_offset"))
        packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=weight.device)
        for piece, mine in _pieces(flat, block):
            code = codes(piece, scale[mine, None], self.name, draw).view(-1)
            start = mine.start * block // 2
            pair = code[0::2] << 4 | code[1::2]
            packed[start : start + len(pair)] = pair[: len(packed) - start]
        rows, width = weight.shape[:-1], weight.shape[-1] if weight.dim() else 1
        found["weight"] = packed.view(*rows, width // 2) if width % 2 == 0 else packed
        if width % block == 0:
            found["absmax"] = found["absmax"].view(*rows, width // block)
        return found

    def unpack(self, tensors: Packed, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None, again: bool = False) -> Tensor:
        second, offset = tensors.get("nested_absmax"), tensors.get("nested_offset")
        return dequantise_4bit(tensors["weight"], tensors["absmax"], second, offset, self.name, tuple(shape), dtype, out, again)

    def product(self, tensors: Packed, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
        if not fits(x, shape[1]):
            return None
        second, offset = tensors.get("nested_absmax"), tensors.get("nested_offset")
        return linear_4bit(x, tensors["weight"], tensors["absmax"], second, offset, self.name, shape[0])

    def part(self, tensors: Packed, shape: tuple[int, ...], index: int) -> dict[str, Tensor] | None:
        absmax, numel = tensors["absmax"], shape.numel() if isinstance(shape, torch.Size) else torch.Size(shape).numel()
        each = numel // shape[0]
        block = block_size(numel, absmax.numel())
        if each % block:
            return None
        second, blocks = tensors.get("nested_absmax"), each // block
        here, weight = slice(index * blocks, (index + 1) * blocks), tensors["weight"].view(shape[0], -1)[index]
        if second is None:
            return {"weight": weight, "absmax": absmax.reshape(-1)[here]}
        start, stop = here.start // NESTED, -(-here.stop // NESTED)
        near, second = absmax.reshape(-1)[start * NESTED : stop * NESTED], second.reshape(-1)[start:stop]
        if here.start % NESTED == 0 and blocks % NESTED == 0:
            return {"weight": weight, "absmax": near, "nested_absmax": second, "nested_offset": tensors["nested_offset"]}
        first = here.start - start * NESTED
        return {"weight": weight, "absmax": scales(near, second, tensors["nested_offset"])[first : first + blocks]}


class NF4Format(FourBit):
    """Sixteen levels at the quantiles of a normal distribution, with an exact zero."""

    name: ClassVar[str] = "nf4"


class FP4Format(FourBit):
    """bitsandbytes' 4-bit float. NF4 has 43% less squared error on normal weights; this is for checkpoints that have it."""

    name: ClassVar[str] = "fp4"


def _pieces(flat: Tensor, block: int) -> Any:
    """Yields ((n, block) fp32 weights, the slice of blocks that they are), the last block padded with zeros."""
    each = _STRIDE // block
    for first in range(0, -(-len(flat) // block), each):
        piece = flat[first * block : (first + each) * block].float()
        piece = F.pad(piece, (0, -len(piece) % block)).view(-1, block)
        yield piece, slice(first, first + len(piece))


def _best(x: Tensor, kind: str) -> Tensor:
    """(blocks,) the scale of least squared error among those of `SEARCH`; the plain one where several are equal."""
    absmax, levels = x.abs().amax(1), table(kind, x.device)
    assert kind in TABLES
    best, least = absmax.clone(), torch.full_like(absmax, float("inf"))
    for factor in sorted(SEARCH, key=lambda f: abs(f - 1)):
        scale = absmax * factor
        error = (levels[codes(x, scale[:, None], kind).int()] * scale[:, None]).sub_(x).square_().sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best
