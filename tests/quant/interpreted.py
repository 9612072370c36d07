"""Run by test_kernels.py under TRITON_INTERPRET=1, which Triton reads when it is imported: each kernel against its plain twin.

fp32 and fp16 only: Triton's interpreter truncates to bf16 where a card rounds (48% of values differ by an ulp).
"""

from __future__ import annotations

import torch

from weft.kernels.eight_bit import dequantise_8bit, dequantise_8bit_reference
from weft.kernels.four_bit import dequantise_4bit, dequantise_4bit_reference
from weft.kernels.fp8_gemm import transposed
from weft.kernels.launch import usable
from weft.quant import FORMATS


def main() -> None:
    torch.manual_seed(0)
    assert usable(torch.zeros(1))
    tried = 0
    wide, narrow = torch.float32, torch.float16
    cases = {(64, 64): wide, (48, 40): narrow, (33, 7): wide, (3, 50, 96): narrow, (1, 1): wide, (300, 260): narrow}
    for shape, dtype in cases.items():
        weight = torch.randn(shape)
        out = torch.empty(shape, dtype=dtype)
        for kind in ("nf4", "fp4"):
            for block, nested in ((32, True), (64, False), (64, True), (4096, True)):
                t = FORMATS[kind].pack(weight, block=block, nested=nested)
                args = (t["weight"], t["absmax"], t.get("nested_absmax"), t.get("nested_offset"), kind)
                want = dequantise_4bit_reference(*args, out=out)
                assert torch.equal(dequantise_4bit(*args, shape, dtype), want), (shape, dtype, kind, block, nested)
                tried += 1
        for kind in ("int8", "fp8", "fp8-block"):
            t = FORMATS[kind].pack(weight)
            want = dequantise_8bit_reference(t["weight"], t["scale"], out)
            assert torch.equal(dequantise_8bit(t["weight"], t["scale"], shape, dtype), want), (shape, dtype, kind)
            tried += 1
        if len(shape) == 2:
            assert torch.equal(transposed(t["weight"]).float(), t["weight"].float().T), shape
            tried += 1
    print(tried, "equal")


if __name__ == "__main__":
    main()
