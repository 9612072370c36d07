"""MXFP4 as transformers decodes it, bit for bit; and a checkpoint of gpt-oss's kind as transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import weft
from tests.conftest import jolt
from weft.adapters import attached, trainable
from weft.quant import FORMATS, is_quantised
from weft.quant.mxfp4 import LEVELS

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but that one NaN is as good as another."""
    nan = a.isnan()
    return a.shape == b.shape and torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(BITS[a.dtype]), b[~nan].view(BITS[b.dtype]))


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 4), rows=st.integers(1, 19), groups=st.integers(1, 5), dtype=st.sampled_from(list(BITS)),
    exponents=st.sampled_from([(0, 256), (100, 140), (0, 3), (253, 256)]), seed=st.integers(0, 999),
)  # fmt: skip
def test_every_byte_is_decoded_as_transformers_decodes_it(
    experts: int, rows: int, groups: int, dtype: torch.dtype, exponents: tuple[int, int], seed: int
) -> None:
    chance = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, generator=chance)
    scales = torch.randint(*exponents, (experts, rows, groups), dtype=torch.uint8, generator=chance)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # (experts, columns, rows)
    form, held, shape = FORMATS["mxfp4"], {"weight": blocks, "scale": scales}, torch.Size((experts, groups * 32, rows))
    ours = form.unpack(held, shape, dtype)
    assert same(ours, theirs)
    for e in range(experts):
        part = form.part(held, shape, e)
        assert part is not None and same(form.unpack(part, shape[1:], dtype), theirs[e])
    flat = form.unpack({"weight": blocks.flatten(-2), "scale": scales}, (experts, rows, groups * 32), dtype)
    assert same(flat, theirs.mT)


def test_all_bytes_and_exponents() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    theirs = convert_moe_packed_tensors(codes[None], scales[None], dtype=torch.float32)[0].mT
    ours = FORMATS["mxfp4"].unpack({"weight": codes.flatten(1), "scale": scales}, (256, 512), torch.float32)
    assert same(ours, theirs)
    assert ours[127, :32].tolist() == [x for byte in range(16) for x in (LEVELS[byte & 15], LEVELS[byte >> 4])], "the low half comes first"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small gpt-oss whose experts are in MXFP4."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_scaling=None,
    )  # fmt: skip
    state: dict[str, Any] = {k: v.contiguous() for k, v in transformers.GptOssForCausalLM(config).to(torch.bfloat16).state_dict().items()}
    for name in [k for k in state if k.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, outside, inside // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(120, 124, (experts, outside, inside // 32), dtype=torch.uint8)
    for name in [k for k in state if k.endswith("_bias")]:
        state[name] = torch.randn_like(state[name])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps(said))
    return tmp_path


def test_a_checkpoint_is_what_transformers_loads(checkpoint: Path) -> None:
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    theirs = theirs.float().eval()  # transformers 5.17 decodes to bf16 whatever is asked, which is exact here
    ours: Any = weft.load_base(checkpoint, base="auto", device="cpu").float()
    assert sum(map(is_quantised, ours.modules())) == 2
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        want = theirs(ids).logits
        assert torch.allclose(ours(ids).logits, want, atol=1e-4 * want.abs().max().item())
    for model in (ours, theirs):
        torch.manual_seed(1)
        weft.adapt(model, weft.LoRA(rank=3, targets=("q_proj",), target_parameters=("experts.gate_up_proj", "experts.down_proj")))
        jolt(torch.nn.ModuleList(attached(model, "default").values()))
        model(ids).logits.square().mean().backward()
    assert not torch.allclose(ours(ids).logits, want, atol=1e-2 * want.abs().max().item())
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4 * want.abs().max().item())
    wanted = trainable(theirs, "default")
    for path, mine in trainable(ours, "default").items():
        assert (mine.grad - wanted[path].grad).norm() < 1e-4 * wanted[path].grad.norm(), path
