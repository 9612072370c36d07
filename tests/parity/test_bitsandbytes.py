"""bitsandbytes is the oracle: its bytes, its files, its numbers.

Its CPU and CUDA kernels differ in places, and weft keeps to CUDA's. What follows from that here, where only the CPU can be asked:

- a block of zeros is NF4 code 7 on its CPU and 0 on CUDA: other bytes, the same value (-1 · 0);
- FP4: a negative number below the smallest border is code 0 on its CPU (8 on CUDA), a positive one 8 (0 on CUDA): the sign of a zero; and
  five of its seven CUDA borders are rounded literals, which moves exact ties of bf16 weights by one level;
- nested scales: its CPU snaps a scale to a grid of 3e-5 before it looks up the nearest of 256, CUDA takes the nearest: up to 2 codes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import weft
from tests.conftest import llama
from weft.kernels.four_bit import dynamic, table
from weft.quant import FORMATS, bitsandbytes, quantise_, roundtrip

logging.disable(logging.WARNING)  # bitsandbytes says on import which optional kernel hub it lacks
F: Any = pytest.importorskip("bitsandbytes.functional")
logging.disable(logging.NOTSET)
SHAPES = ((128, 128), (48, 40), (33, 7), (64, 1024), (1, 2))  # blocks straddle the rows of 48 × 40; 33 × 7 is odd, its last block short


def weights(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_the_tables_are_its() -> None:
    for kind in ("nf4", "fp4"):
        assert torch.equal(table(kind, torch.device("cpu")), F.get_4bit_type(kind, device="cpu"))
    assert torch.equal(dynamic(torch.device("cpu")), F.create_dynamic_map(signed=True))


@pytest.mark.parametrize("block", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_without_nesting_has_its_bytes(shape: tuple[int, int], block: int) -> None:
    w = weights(shape)
    packed, state = F.quantize_4bit(w, blocksize=block, quant_type="nf4")
    mine = FORMATS["nf4"].pack(w, block=block, nested=False)
    assert torch.equal(mine["weight"].flatten(), packed.flatten()) and torch.equal(mine["absmax"].flatten(), state.absmax)


def test_a_block_of_zeros_has_other_bytes_and_the_same_value() -> None:
    w = weights((4, 64))
    w[1] = 0
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type="nf4")
    mine = FORMATS["nf4"].pack(w, block=64, nested=False)
    assert (packed.view(4, 32)[1] == 0x77).all() and (mine["weight"][1] == 0).all()
    assert torch.equal(FORMATS["nf4"].unpack(mine, w.shape, w.dtype), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_fp4_differs_by_the_sign_of_zeros_and_by_ties(shape: tuple[int, int]) -> None:
    w = weights(shape)
    packed, _ = F.quantize_4bit(w, blocksize=64, quant_type="fp4")
    mine = FORMATS["fp4"].pack(w, block=64, nested=False)
    ours, theirs = FORMATS["fp4"].unpack(mine, shape, torch.float32), FORMATS["fp4"].unpack(mine | {"weight": packed}, shape, torch.float32)
    blocks = mine["absmax"].flatten().repeat_interleave(64)[: w.numel()].view(shape)
    other = ours != theirs
    size = (w.float() / blocks).abs()[other]
    borders = torch.tensor([0.0026041667, 0.0859375, 0.2083333, 0.2916667, 0.4166667, 0.5833333, 0.8333333])
    assert other.float().mean() < 2e-3 and all((borders - s).abs().min() < 1e-6 for s in size), "only ties differ in value"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(256, 512), (48, 40), (33, 7)], ids=str)
def test_nested_scales_are_within_the_rule(shape: tuple[int, int], kind: str) -> None:
    w = weights(shape)
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=True)
    mine = FORMATS[kind].pack(w)
    assert torch.allclose(mine["nested_absmax"], state.state2.absmax) and torch.allclose(mine["nested_offset"], state.offset, rtol=1e-6)
    codes = mine["absmax"].flatten().int() - state.absmax.int()
    assert codes.abs().max() <= 2 and (codes != 0).float().mean() < 0.05
    exact, theirs = w.float(), F.dequantize_4bit(packed, state).float()
    ours = roundtrip(w, kind).float()
    assert (ours - exact).norm() <= (theirs - exact).norm() * 1.001
    apart = (ours - theirs).abs() > 0.02 * exact.abs().max()
    assert apart.float().mean() < (1e-9 if kind == "nf4" else 2e-3), "but for exact ties of fp4"


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "dq"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_its_weights_are_read_bit_for_bit_and_written_as_it_would(kind: str, nested: bool, storage: torch.dtype) -> None:
    for shape in (*SHAPES[:2], (33, 8), (64, 1024)):
        for block in (64, 128):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                w = weights(shape).to(dtype)
                packed, state = F.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=storage)
                file = {"m.weight": packed} | {f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
                assert list(bitsandbytes.packed_keys(file)) == ["m.weight"]
                got = bitsandbytes.read("m.weight", file)
                assert (got.base, got.shape, got.dtype) == (kind, w.shape, dtype)
                assert torch.equal(FORMATS[kind].unpack(got.tensors, shape, dtype), F.dequantize_4bit(packed, state))
                again = bitsandbytes.write("m.weight", got.base, got.tensors, got.shape, got.dtype)
                assert again.keys() == file.keys()
                for key, value in file.items():
                    its = value.flatten()
                    assert torch.equal(again[key].flatten(), its.view(torch.uint8) if key == "m.weight" else its), key


def test_llm_int8_weights_are_read() -> None:
    w = weights((48, 40)).half()
    q, SCB, _ = F.int8_vectorwise_quant(w)
    got = bitsandbytes.read("m.weight", {"m.weight": q, "m.SCB": SCB})
    want = q.float() * SCB[:, None] / 127
    assert torch.allclose(FORMATS["int8"].unpack(got.tensors, got.shape, torch.float32), want, rtol=1e-6, atol=0)
    mine = FORMATS["int8"].pack(w)
    assert (mine["weight"].int() - q.int()).abs().max() <= 1 and torch.allclose(mine["scale"].flatten() * 127, SCB.float())


@pytest.mark.parametrize(
    ("base", "options", "rmse"),
    [("nf4", dict(nested=False), 0.0920), ("nf4", {}, 0.0920), ("fp4", dict(nested=False), 0.1219), ("fp4", {}, 0.12195),
     ("nf4", dict(quant_scale="mse", nested=False), 0.0853), ("nf4", dict(quant_scale="mse"), 0.0853), ("int8", {}, 0.00869),
     ("fp8-block", {}, 0.0265)],
)  # fmt: skip
def test_the_error_on_normal_weights(base: str, options: dict, rmse: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(1024, 4096) if "quant_scale" not in options else torch.randn(512, 2048)
    assert (roundtrip(w, base, **options) - w).square().mean().sqrt().item() == pytest.approx(rmse, abs=1e-4)


def test_transformers_loads_what_weft_writes_to_the_same_logits(tmp_path: Path, ids: Tensor) -> None:
    """A checkpoint written tensor by tensor under bitsandbytes' keys, through transformers and bitsandbytes."""
    model = llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    report = quantise_(model, "nf4")
    tensors = {}
    for key, value in model.state_dict().items():
        module, _, name = key.rpartition(".")
        layer = model.get_submodule(module)
        if not isinstance(layer, weft.quant.Quantised):
            tensors[key] = value
        elif name == "weight":
            tensors |= bitsandbytes.write(key, layer.form.name, layer.tensors(), layer.shapes["weight"], layer.dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.quantization_config = bitsandbytes.config("nf4", True, ["lm_head"])
    model.config.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu").eval()
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit" and len(report.layers) == 14
    for path, layer in model.named_modules():
        if isinstance(layer, weft.quant.Quantised):
            its = theirs.get_submodule(path).weight
            assert torch.equal(F.dequantize_4bit(its.data, its.quant_state), weft.quant.dense(layer))
    # In training mode: for evaluation its kernels on a CPU with AVX512-BF16 repack the weight in place and round the scales to bf16.
    assert torch.allclose(theirs.train()(ids).logits, model(ids).logits, atol=0.01)
