"""Files in peft's layout, both ways: what one package saves, the other loads, and the logits agree to 1e-6 in fp32."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.conftest import ConvNet, Plain, gpt2, jolt, llama
from tests.parity.quiet import PEFTS_OWN

pytestmark = PEFTS_OWN


class Convolutions(nn.Module):
    """Plain convolutions: peft drops dilation and padding modes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (llama, dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])),
    "all-linear": (llama, dict(target_modules="all-linear", lora_dropout=0.1)),
    "regex": (llama, dict(target_modules=r".*layers\.1.*(q|v)_proj")),
    "exclude": (llama, dict(target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.k_proj"])),
    "rslora": (llama, dict(r=4, target_modules=["v_proj"], use_rslora=True)),
    "patterns": (
        llama,
        dict(r=4, target_modules="all-linear", rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
             alpha_pattern={"^model.layers.0.mlp.down_proj": 3}),
    ),
    "embedding": (llama, dict(r=4, target_modules=["embed_tokens", "o_proj"])),
    "head": (llama, dict(r=4, target_modules=["lm_head"])),
    "lora-bias": (gpt2, dict(r=4, target_modules=["c_fc"], lora_bias=True)),
    "bias-lora-only": (gpt2, dict(r=4, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)),
    "bias-all": (gpt2, dict(r=4, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "conv1d": (gpt2, dict(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "wte": (gpt2, dict(r=4, target_modules=["wpe"])),
    "conv2d": (ConvNet, dict(r=4, target_modules=["out", "third"])),
    "layers": (llama, dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "modules-to-save": (llama, dict(target_modules=["q_proj"], modules_to_save=["lm_head", "post_attention_layernorm"])),
    "modules-to-save-tied": (gpt2, dict(target_modules=["c_attn"], modules_to_save=["wpe", "ln_f"], fan_in_fan_out=True)),
    "modules-to-save-tied-both": (
        lambda: llama(tie_word_embeddings=True), dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    ),
    "dora": (llama, dict(r=4, lora_alpha=6, target_modules="all-linear", use_dora=True)),
    "dora-conv1d": (gpt2, dict(r=4, target_modules=["c_attn", "c_proj", "wpe"], use_dora=True, fan_in_fan_out=True, bias="lora_only")),
    "dora-plain": (Plain, dict(r=4, target_modules=["up", "down", "embed"], use_dora=True, use_rslora=True)),
    "dora-conv2d": (Convolutions, dict(r=4, target_modules=["one", "two"], use_dora=True)),
    "plain-linear": (Plain, dict(r=4, target_modules=["up", "down", "embed"], bias="all")),
}  # fmt: skip


def _inputs(model: nn.Module) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(3, 3, 8, 8) if isinstance(model, ConvNet | Convolutions) else torch.randint(3, 40, (3, 9))


def _out(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Any = model(x)
    return y.logits if hasattr(y, "logits") else y


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[nn.Module, peft.LoraConfig]:
    make, options = KINDS[request.param]
    torch.manual_seed(0)
    base = make().eval()
    task = "CAUSAL_LM" if hasattr(base, "config") else None
    return base, peft.LoraConfig(task_type=task, **options)


def test_what_peft_saves_weft_loads(kind: tuple[nn.Module, peft.LoraConfig], tmp_path: Path) -> None:
    base, config = kind
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    jolt(theirs)
    theirs.save_pretrained(tmp_path)
    x = _inputs(base)
    ours = weft.load(copy.deepcopy(base), tmp_path)
    assert (_out(ours, x) - _out(theirs, x)).abs().max() <= 1e-6
    assert (_out(ours, x) - _out(base, x)).abs().max() > 1e-3


def test_what_weft_saves_peft_loads(kind: tuple[nn.Module, peft.LoraConfig], tmp_path: Path) -> None:
    base, config = kind
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "theirs")
    ours = weft.load(copy.deepcopy(base), tmp_path / "theirs", name="mine")
    jolt(ours)
    weft.save(ours, tmp_path / "ours", name="mine")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    expected = set(json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()))
    assert set(written) <= expected, "no key that peft does not know"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    x = _inputs(base)
    assert (_out(ours, x) - _out(theirs, x)).abs().max() <= 1e-6
    assert (_out(ours, x) - _out(base, x)).abs().max() > 1e-3


def test_the_same_gradients_as_peft(kind: tuple[nn.Module, peft.LoraConfig], tmp_path: Path) -> None:
    base, config = kind
    config.lora_dropout = 0.0
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    jolt(theirs)
    theirs.save_pretrained(tmp_path)
    ours, x = weft.load(copy.deepcopy(base), tmp_path), _inputs(base)
    for model in (ours, theirs.base_model.model):
        y: Any = model(x)
        (y.logits if hasattr(y, "logits") else y).square().mean().backward()
    for p in (p for p in theirs.parameters() if p.requires_grad):
        p.data = p.grad  # save the gradients as if they were the weights: the file then matches them up by name
    theirs.save_pretrained(tmp_path / "gradients")
    grads = weft.adapters.trainable(weft.load(copy.deepcopy(base), tmp_path / "gradients"), "default")
    for key, p in weft.adapters.trainable(ours, "default").items():
        assert p.grad is not None
        assert torch.allclose(p.grad, grads[key], rtol=1e-4, atol=1e-6), key


def test_all_linear_is_peft_s_all_linear() -> None:
    base = llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = weft.adapt(base, weft.LoRA(rank=8))
    line = weft.summary(ours).line
    trainable, total = theirs.get_nb_trainable_parameters()
    assert line == f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


@pytest.mark.parametrize("name", ["0", "layers", "q_proj", "self_attn", "lora_A", "type", "keys", "weft"])
def test_no_name_loses_tensors(name: str, tmp_path: Path) -> None:
    """peft 0.21.2 drops tensors of adapters whose name is a part of a path."""
    model = weft.adapt(llama(), weft.LoRA(rank=2), name="other")
    weft.adapt(model, weft.LoRA(rank=2), name=name)
    jolt(model)
    weft.save(model, tmp_path, name=name)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    x = _inputs(model)
    assert (_out(model, x) - _out(theirs, x)).abs().max() <= 1e-6


def test_several_active_adapters_add_up(tmp_path: Path) -> None:
    base = llama()
    model = copy.deepcopy(base)
    for seed, name in enumerate(("a", "b")):
        weft.adapt(model, weft.LoRA(rank=2), name=name)
        jolt(nn.ModuleList(weft.adapters.attached(model, name).values()), seed=seed)
        weft.save(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a").eval()
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.base_model.set_adapter(["a", "b"])
    weft.use(model, ["a", "b"])
    x = _inputs(base)
    both = _out(model, x)
    assert (both - _out(theirs, x)).abs().max() <= 1e-6
    weft.use(model, ["b", "a"])
    assert (both - _out(model, x)).abs().max() <= 5e-5
    weft.merge(model)
    assert (both - _out(model, x)).abs().max() <= 5e-5
