"""Each kernel against its plain twin, on shapes drawn at random; the Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from weft.kernels import four_bit
from weft.kernels.four_bit import NF4, TABLES, block_size, scales
from weft.kernels.scratch import _all as buffers_of_all
from weft.kernels.scratch import release, scratch
from weft.quant import FORMATS, QuantLinear, computing, dense, relative_error, roundtrip
from weft.quant.four_bit import BLOCKS

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 200))
FOUR = st.sampled_from(["nf4", "fp4"])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux only")
def test_the_triton_kernels_equal_plain_torch() -> None:
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, script], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "71 equal, 144 close", done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("base", ["nf4", "int8", "fp8"])
def test_on_a_card_that_is_not_the_current_one(base: str) -> None:
    layer = QuantLinear.of(FORMATS[base].pack(torch.randn(256, 512)), (256, 512), base, torch.float32)
    xs = [torch.randn(tokens, 512) for tokens in (1, 9, 70)]  # each by a kernel of its own
    want = [layer(x) for x in xs]
    layer.to("cuda:1")
    with torch.cuda.device(0), torch.no_grad():
        for x, y in zip(xs, want, strict=True):
            got = layer(x.to("cuda:1", torch.bfloat16)).float().cpu()
            assert (got - y).norm() <= 2e-2 * y.norm()


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, block=st.sampled_from(BLOCKS), kind=FOUR, nested=st.booleans(), seed=st.integers(0, 99))
def test_a_weight_is_decoded_element_by_element(shape: tuple[int, int], block: int, kind: str, nested: bool, seed: int) -> None:
    torch.manual_seed(seed)
    w = torch.randn(shape) * 10 ** torch.randn(())
    held = FORMATS[kind].pack(w, block=block, nested=nested)
    got = FORMATS[kind].unpack(held, shape, torch.float32).flatten()
    numel = w.numel()
    found = block_size(numel, held["absmax"].numel())
    assert -(-numel // found) == -(-numel // block) and (found == block or held["absmax"].numel() == 1)
    packed, levels = held["weight"].flatten().tolist(), torch.tensor(NF4)
    if kind == "nf4" and not nested:
        for i in range(0, numel, max(1, numel // 17)):
            code = packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15
            assert got[i] == levels[code] * held["absmax"].flatten()[i // block]
            assert (levels * held["absmax"].flatten()[i // block] - w.flatten()[i]).abs().argmin() == code
    again = FORMATS[kind].pack(got.view(shape), block=block, nested=False)
    assert torch.allclose(FORMATS[kind].unpack(again, shape, torch.float32).flatten(), got, rtol=1e-5, atol=1e-6) or nested
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(FORMATS[kind].unpack(held, shape, dtype), got.view(shape).to(dtype)), "computed in fp32, rounded once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 601), (37, 333), (64, 512)])
def test_a_cpu_decodes_piece_by_piece(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, nested in (("nf4", True), ("fp4", False)):
        held = FORMATS[kind].pack(torch.randn(shape), nested=nested)
        whole = FORMATS[kind].unpack(held, shape, dtype)
        levels = torch.tensor(TABLES[kind])[torch.stack([held["weight"] >> 4, held["weight"] & 15], -1).flatten().int()]
        scale = scales(held["absmax"], held.get("nested_absmax"), held.get("nested_offset")).repeat_interleave(64)
        assert torch.equal(whole.flatten(), (levels[: whole.numel()] * scale[: whole.numel()]).to(dtype))
        with monkeypatch.context() as patched:
            patched.setattr(four_bit, "_STRIDE", 4096)
            for offset in (0, 1):  # pairs of values cannot be written at an odd place
                room = torch.full((whole.numel() + 2,), 7.0, dtype=dtype)
                out = room[offset : offset + whole.numel()].view(shape)
                assert FORMATS[kind].unpack(held, shape, dtype, out) is out and torch.equal(out, whole)
                assert all(v == 7 for v in (*room[:offset], *room[offset + whole.numel() :]))


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_a_searched_scale_is_never_worse(shape: tuple[int, int], seed: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for kind in ("nf4", "fp4"):
        plain, searched = (relative_error(w, roundtrip(w, kind, nested=False, quant_scale=q)) for q in ("absmax", "mse"))
        assert searched <= plain * (1 + 1e-6)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, base=st.sampled_from(["nf4", "fp4", "int8", "fp8", "fp8-block"]), seed=st.integers(0, 99))
def test_a_layer_computes_with_its_numbers(shape: tuple[int, int], base: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer = QuantLinear.of(FORMATS[base].pack(torch.randn(shape)), shape, base, torch.float32, torch.randn(shape[0]))
    W = dense(layer).double()
    x, g = torch.randn(2, 3, shape[1], requires_grad=True), torch.randn(2, 3, shape[0])
    y = layer(x)
    y.backward(g)
    assert torch.allclose(y.double(), x.double() @ W.T + layer.bias, atol=1e-4)
    assert torch.allclose(x.grad.double(), g.double() @ W, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_layer_that_is_computed_again_has_the_same_gradient() -> None:
    """torch's checkpoint hands what is kept out once."""
    layer = QuantLinear.of(FORMATS["nf4"].pack(torch.randn(48, 64)), (48, 64), "nf4", torch.float32)
    x = torch.randn(5, 64, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(got, want)


def test_part_of_experts_is_a_part_of_the_whole() -> None:
    w = torch.randn(3, 8, 64)
    for base, options in (("nf4", {}), ("nf4", dict(nested=False)), ("int8", {}), ("fp8-block", {})):
        held = FORMATS[base].pack(w, **options)
        part = FORMATS[base].part(held, w.shape, 1)
        assert part is not None
        assert torch.equal(FORMATS[base].unpack(part, (8, 64), torch.float32), FORMATS[base].unpack(held, w.shape, torch.float32)[1])
    assert FORMATS["nf4"].part(FORMATS["nf4"].pack(torch.randn(3, 5, 7)), torch.Size((3, 5, 7)), 1) is None, "blocks straddle experts"


def test_the_buffer_is_used_again_and_belongs_to_its_thread() -> None:
    like = torch.zeros(1)
    first = scratch((4, 8), like, torch.float32)
    assert first is not None
    with torch.inference_mode():
        assert scratch((2, 3), like, torch.float32).data_ptr() == first.data_ptr()
    theirs: list[int] = []
    done = threading.Event()

    def work() -> None:
        theirs.append(scratch((4, 8), like, torch.float32).data_ptr())
        done.wait()
        theirs.append(sum(len(b) for b in buffers_of_all))

    thread = threading.Thread(target=work)
    thread.start()
    while not theirs:
        pass
    assert theirs[0] != first.data_ptr() and sum(len(b) for b in buffers_of_all) >= 2
    release()
    done.set()
    thread.join()
    assert theirs[1] == 0
    assert scratch((4, 8), torch.zeros(1, device="meta"), torch.float32) is None
    release()


def test_a_cpu_multiplies_in_the_dtype_that_it_is_fast_in() -> None:
    cpu = torch.device("cpu")
    assert computing(torch.float32, cpu) == torch.float32 and computing(torch.float16, cpu) == torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert computing(torch.bfloat16, cpu) == (torch.bfloat16 if fast else torch.float32)
    assert computing(torch.bfloat16, torch.device("meta")) == torch.bfloat16


def test_moving_and_casting_never_touch_the_bytes() -> None:
    for base in ("nf4", "int8", "fp8", "fp8-block"):
        layer = QuantLinear.of(FORMATS[base].pack(torch.randn(8, 64)), (8, 64), base, torch.float32, torch.zeros(8))
        before = {k: v.clone() for k, v in layer.tensors().items()}
        want = dense(layer)
        for cast in (nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to("cpu", torch.float32)):
            layer = cast(layer)
            for key, value in layer.tensors().items():
                assert value.dtype == before[key].dtype and value.tolist() == before[key].tolist(), (base, key)
            assert layer.bias.dtype == layer.dtype == dense(layer).dtype
        assert torch.equal(dense(layer), want)
        layer.requires_grad_(True)
        assert not layer.weight.requires_grad and layer.bias.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")  # what torch's compiler itself causes
@pytest.mark.parametrize("base", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiled_layer_has_the_gradient_of_the_plain_one(base: str, dtype: torch.dtype) -> None:
    """One graph; torch 2.11 gave zeros for a gradient once."""
    torch.manual_seed(0)
    layer = QuantLinear.of(FORMATS[base].pack(torch.randn(24, 33)), (24, 33), base, dtype)
    x = torch.randn(5, 33, dtype=dtype, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for work in (compiled, layer):
        y = work(x)
        (got,) = torch.autograd.grad(y, x, torch.ones_like(y))
        want = torch.ones(5, 24) @ dense(layer).float()
        assert (got.float() - want).norm() <= 1e-2 * want.norm()
