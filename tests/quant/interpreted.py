"""Run by test_kernels.py under TRITON_INTERPRET=1, which Triton reads when it is imported: each kernel against its plain twin.

fp32 and fp16 only: Triton's interpreter truncates to bf16 where a card rounds (48% of values differ by an ulp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.kernels import few_tokens
from weft.kernels.eight_bit import dequantise_8bit, dequantise_8bit_reference
from weft.kernels.four_bit import dequantise_4bit, dequantise_4bit_reference
from weft.kernels.fp8_gemm import transposed
from weft.kernels.launch import usable
from weft.quant import FORMATS, QuantLinear, dense, quantise_

FORMS: list[tuple[str, dict[str, Any]]] = [(k, dict(block=b, nested=n)) for k, b, n in (
    ("nf4", 64, True), ("nf4", 64, False), ("nf4", 32, True), ("nf4", 4096, False), ("fp4", 128, True), ("fp4", 32, False))]  # fmt: skip
FORMS += [("int8", {}), ("fp8", {}), ("fp8-block", {})]


def close(got: Tensor, want: Tensor, what: Any) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert got.shape == want.shape and error < (1e-6 if got.dtype == torch.float32 else 1e-3), (what, got.shape, want.shape, error)


def products() -> int:
    """x Wᵀ for a few tokens against decoding and multiplying in fp32; in 96 and 160 inputs blocks of 64 and 128 straddle rows."""
    tried = 0
    for outputs, inputs in ((5, 32), (33, 96), (18, 160), (70, 544)):
        for kind, options in FORMS:
            held = FORMATS[kind].pack(torch.randn(outputs, inputs), **options)
            for dtype, leading in ((torch.float32, (3,)), (torch.float16, (1,)), (torch.float16, (2, 3)), (torch.float16, (16,))):
                x = torch.randn(*leading, inputs).to(dtype)
                got = FORMATS[kind].product(held, (outputs, inputs), x)
                assert got is not None and got.dtype == dtype
                if kind in ("nf4", "fp4"):
                    rest = (held["absmax"], held.get("nested_absmax"), held.get("nested_offset"), kind)
                    want = few_tokens.linear_4bit_reference(x, held["weight"], *rest, outputs)
                else:
                    want = few_tokens.linear_8bit_reference(x, held["weight"], held["scale"], outputs)
                close(got, want, (outputs, inputs, kind, options, dtype, leading))
                tried += 1
    one = FORMATS["fp8-block"].pack(torch.randn(9, 64))
    x = torch.randn(2, 128)[:, 1:65]  # a single scale for all; an x whose rows are not side by side
    W = FORMATS["fp8-block"].unpack(one, (9, 64), x.dtype)
    close(few_tokens.linear_8bit(x, one["weight"], one["scale"][0, 0], 9), x @ W.T, "one scale")
    odd = FORMATS["nf4"].pack(torch.randn(8, 40))
    assert FORMATS["nf4"].product(odd, (8, 40), torch.randn(1, 40)) is None, "rows that are no whole groups"
    assert FORMATS["int8"].product(one, (9, 64), torch.randn(17, 64).half()) is None, "too many tokens"
    assert all(FORMATS["int8"].product(one, (9, 64), torch.randn(1, 64).to(t)) is None for t in (torch.float64, torch.bfloat16))
    return tried


def layers() -> None:
    """Whole layers: when the product is taken, bias, adapters on top, compiled."""

    class Never(QuantLinear):
        def decoded(self, x: Tensor) -> Tensor:
            raise AssertionError("decoded")

    for kind, options in FORMS:
        held = FORMATS[kind].pack(torch.randn(24, 96), **options)
        layer, never = (c.of(held, (24, 96), kind, torch.float32, torch.randn(24)) for c in (QuantLinear, Never))
        x = torch.randn(1, 1, 96)
        W = dense(layer)
        close(never(x), x @ W.T + never.bias, kind)
        with torch.inference_mode():
            close(never(x), x @ W.T + never.bias, kind)
        y = layer(x.requires_grad_())
        y.sum().backward()
        close(x.grad, W.sum(0).expand(1, 1, 96), "with a gradient it is decoded")
        with torch.no_grad():
            close(never(x), y - layer.bias + never.bias, "nothing is recorded here")
            torch._dynamo.reset()
            close(torch.compile(never, backend="aot_eager", fullgraph=True)(x), never(x), "compiled")
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32, bias=False)).requires_grad_(False)
    quantise_(model, "nf4")
    assert all(isinstance(model[i], QuantLinear) for i in (0, 2))
    weft.adapt(model, weft.LoRA(rank=4, targets=("0", "2")))
    for p in weft.adapters.trainable(model, "default").values():
        p.data.normal_()
    x = torch.randn(2, 1, 64)
    trained = model(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        close(model(x), trained, "with adapters")


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
    layers()
    print(tried, "equal,", products(), "close")


if __name__ == "__main__":
    main()
