"""Decoding a packed weight on a GPU: share of the copy bandwidth, and forward and backward of a layer beside bf16.

    python bench/dequant.py            # bench/results/dequant.json

The bandwidth is counted as bytes read and written; the yardstick is a copy from device to device of as many bytes as the numbers have.
Every figure is the median of CUDA-event timings with the L2 cache flushed between.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from _common import save
from torch import nn

from weft.kernels.eight_bit import tiles
from weft.kernels.four_bit import block_size, dynamic, table
from weft.kernels.triton import dequantise_4bit_triton, dequantise_8bit_triton
from weft.quant import FORMATS, QuantLinear

DEVICE = torch.device("cuda")
SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096), (8192, 8192))
FORMATS_TRIED = {"nf4+dq": ("nf4", dict(nested=True)), "nf4": ("nf4", dict(nested=False)), "fp4+dq": ("fp4", dict(nested=True)),
                 "int8": ("int8", {}), "fp8": ("fp8", {}), "fp8-block": ("fp8-block", {})}  # fmt: skip


def median(work: Any) -> float:
    """Milliseconds."""
    return float(triton.testing.do_bench(work, warmup=10, rep=60, return_mode="median"))


def decode(base: str, held: dict[str, torch.Tensor], out: torch.Tensor, size: int, warps: int) -> torch.Tensor:
    if base in ("nf4", "fp4"):
        rest = (held["absmax"], held.get("nested_absmax"), held.get("nested_offset"), table(base, DEVICE), dynamic(DEVICE))
        return dequantise_4bit_triton(held["weight"], *rest, out, block_size(out.numel(), held["absmax"].numel()), size, warps)
    return dequantise_8bit_triton(held["weight"], held["scale"], out, *tiles(tuple(out.shape), held["scale"]), size, warps)


def bandwidth(sweep: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        other = torch.empty_like(out)
        copy = 2 * out.nbytes / median(lambda: other.copy_(out)) / 1e9
        weight = torch.randn(shape, device=DEVICE)
        for name, (base, options) in FORMATS_TRIED.items():
            held = FORMATS[base].pack(weight, **options)
            moved = sum(t.nbytes for t in held.values()) + out.nbytes
            tried = {}
            for size in (256, 512, 1024, 2048, 4096) if sweep else (1024,):
                for warps in (2, 4, 8) if sweep else (4,):
                    tried[f"{size}/{warps}"] = median(lambda: decode(base, held, out, size, warps))
            shipped = median(lambda: FORMATS[base].unpack(held, shape, torch.bfloat16, out))
            best = min(tried, key=tried.__getitem__)
            row = {"shape": list(shape), "format": name, "ms": shipped, "tb_per_s": moved / shipped / 1e9, "copy_tb_per_s": copy,
                   "share_of_copy": moved / shipped / 1e9 / copy}  # fmt: skip
            rows.append(row | ({"best": best, "best_ms": tried[best], "best_share": moved / tried[best] / 1e9 / copy} if sweep else {}))
            print(rows[-1], flush=True)
    return rows


def layers() -> list[dict[str, Any]]:
    """Forward and backward (the gradient of x) of one layer of 4096 × 4096 and 14336 × 4096, eager, in bf16."""
    rows = []
    for shape in ((4096, 4096), (14336, 4096)):
        weight = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / 64
        plain = nn.Linear(shape[1], shape[0], bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
        plain.weight.data.copy_(weight)
        packed = {n: QuantLinear.of(FORMATS[b].pack(weight, **o), shape, b, weight.dtype) for n, (b, o) in FORMATS_TRIED.items()}
        for tokens in (512, 2048, 8192):
            x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            g = torch.randn(tokens, shape[0], device=DEVICE, dtype=torch.bfloat16)

            def both(layer: nn.Module) -> None:
                x.grad = None
                layer(x).backward(g)

            base = median(lambda: both(plain))
            for name, layer in packed.items():
                took = median(lambda: both(layer))
                rows.append({"shape": list(shape), "tokens": tokens, "format": name, "ms": took, "bf16_ms": base, "ratio": took / base})
                print(rows[-1], flush=True)
    return rows


def kept() -> dict[str, float]:
    """MiB that autograd keeps from the forward pass for one packed layer, eager and compiled, over what the activations need."""
    shape, tokens, found = (4096, 4096), 256, {}
    for mode in ("eager", "compiled"):
        layer = nn.Sequential(*(QuantLinear.of(FORMATS["nf4"].pack(torch.randn(shape, device=DEVICE)), shape, "nf4", torch.bfloat16)
                                for _ in range(4)))  # fmt: skip
        run = torch.compile(layer, fullgraph=True) if mode == "compiled" else layer
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        run(x).sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = run(x)
        found[mode] = (torch.cuda.memory_allocated() - before - y.nbytes) / 2**20
        y.sum().backward()
    print(found)
    return found


def main() -> None:
    sweep = "--sweep" in sys.argv
    result = {"decoding": bandwidth(sweep), "forward_and_backward": layers(), "kept_mib_by_four_layers": kept()}
    print(save("dequant", result))


if __name__ == "__main__":
    main()
