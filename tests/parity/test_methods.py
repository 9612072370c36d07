"""Every method but LoRA in peft's layout, both ways: one package's files in the other, the logits to 1e-6 and the gradients to 1e-5."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
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


class Sound(nn.Module):
    """A convolution of one dimension; takes (n, 8, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Conv1d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wave(x))


@dataclass
class Kind:
    make: Callable[[], nn.Module]
    config: Callable[..., Any]
    options: dict[str, Any]
    mine: str  # the method of weft that this must become


KINDS: dict[str, Kind] = {
    "ia3": Kind(llama, peft.IA3Config, {}, "IA3"),  # peft's own table of targets
    "ia3-names": Kind(llama, peft.IA3Config, dict(target_modules=["q_proj", "v_proj"], feedforward_modules=["q_proj"]), "IA3"),
    "ia3-gpt2": Kind(gpt2, peft.IA3Config, dict(fan_in_fan_out=True), "IA3"),
    "ia3-conv": Kind(ConvNet, peft.IA3Config, dict(target_modules=["first", "second", "out"], feedforward_modules=["second"]), "IA3"),
    "ia3-regex": Kind(Plain, peft.IA3Config, dict(target_modules="up|down", feedforward_modules="do.*"), "IA3"),
    "loha": Kind(llama, peft.LoHaConfig, dict(r=3, alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}), "LoHa"),
    "loha-conv": Kind(ConvNet, peft.LoHaConfig, dict(r=2, target_modules=["second", "third", "out"]), "LoHa"),
    "loha-cored": Kind(ConvNet, peft.LoHaConfig, dict(r=2, target_modules=["second", "third"], use_effective_conv2d=True), "LoHa"),
    "loha-conv1d": Kind(Sound, peft.LoHaConfig, dict(r=2, target_modules=["wave"], use_effective_conv2d=True), "LoHa"),
    "lokr": Kind(llama, peft.LoKrConfig, dict(r=3, alpha=5, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 2}), "LoKr"),
    "lokr-both": Kind(llama, peft.LoKrConfig, dict(r=1, target_modules=["k_proj", "up_proj"], decompose_both=True), "LoKr"),
    "lokr-factor": Kind(llama, peft.LoKrConfig, dict(r=2, target_modules=["k_proj", "up_proj"], decompose_factor=16), "LoKr"),
    "lokr-conv": Kind(ConvNet, peft.LoKrConfig, dict(r=8, target_modules=["second", "third", "out"]), "LoKr"),
    "lokr-thin": Kind(ConvNet, peft.LoKrConfig, dict(r=1, target_modules=["second", "third"]), "LoKr"),
    "lokr-cored": Kind(ConvNet, peft.LoKrConfig, dict(r=1, target_modules=["second", "third"], use_effective_conv2d=True), "LoKr"),
    "lokr-conv1d": Kind(Sound, peft.LoKrConfig, dict(r=8, target_modules=["wave"]), "LoKr"),
    "oft": Kind(llama, peft.OFTConfig, dict(oft_block_size=8, target_modules=["q_proj", "down_proj"]), "OFT"),
    "oft-inverse": Kind(llama, peft.OFTConfig, dict(oft_block_size=8, target_modules=["v_proj"], use_cayley_neumann=False), "OFT"),
    "oft-blocks": Kind(llama, peft.OFTConfig, dict(oft_block_size=0, r=3, block_share=True, target_modules=["v_proj"]), "OFT"),
    "oft-three-terms": Kind(llama, peft.OFTConfig, dict(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=["v_proj"]), "OFT"),
    "oft-seven-terms": Kind(llama, peft.OFTConfig, dict(oft_block_size=4, num_cayley_neumann_terms=7, target_modules=["v_proj"]), "OFT"),
    "oft-constrained": Kind(llama, peft.OFTConfig, dict(oft_block_size=4, coft=True, eps=0.5, target_modules=["v_proj"]), "OFT"),
    "loha-layers": Kind(llama, peft.LoHaConfig, dict(r=3, target_modules=["q_proj"], layers_to_transform=0), "LoHa"),
    "lokr-layers": Kind(llama, peft.LoKrConfig, dict(r=3, target_modules=["q_proj", "lm_head"], layers_to_transform=[1]), "LoKr"),
    "oft-layers": Kind(
        llama, peft.OFTConfig, dict(oft_block_size=4, target_modules=["v_proj"], layers_to_transform=[1], layers_pattern="layers"), "OFT"
    ),
    "vera-layers": Kind(llama, peft.VeraConfig, dict(r=4, d_initial=1.0, target_modules=["q_proj"], layers_to_transform=[1]), "VeRA"),
    "adalora-layers": Kind(
        llama, peft.AdaLoraConfig, dict(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], layers_to_transform=[1]), "AdaLoRA"
    ),
    "ln": Kind(llama, peft.LNTuningConfig, {}, "LNTuning"),
    "ln-gpt2": Kind(gpt2, peft.LNTuningConfig, {}, "LNTuning"),
    "ln-plain": Kind(Plain, peft.LNTuningConfig, dict(target_modules=["norm"]), "LNTuning"),
}


def _inputs(model: nn.Module) -> Tensor:
    torch.manual_seed(5)
    if isinstance(model, Sound):
        return torch.randn(3, 8, 9)
    return torch.randn(3, 3, 8, 8) if isinstance(model, ConvNet) else torch.randint(3, 40, (3, 9))


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    y: Any = model(x)
    return y.logits if hasattr(y, "logits") else y


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_files_both_ways_and_gradients(kind: Kind, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = kind.make().eval()
    x = _inputs(base)
    config = kind.config(task_type="CAUSAL_LM" if hasattr(base, "config") else None, **kind.options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    jolt(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    want = _logits(theirs, x)

    ours = weft.load(copy.deepcopy(base), tmp_path / "theirs", name="mine")
    got = _logits(ours, x)
    assert type(next(iter(weft.adapters.attached(ours, "mine").values())).method).__name__ == kind.mine
    assert (got - want).abs().max() <= 1e-6 * want.abs().max().clamp_min(1)
    with torch.no_grad():
        assert (got - _logits(base, x)).abs().max() > 5e-5

    got.square().mean().backward()
    want.square().mean().backward()
    grads: dict[str, Any] = {k: p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    for p in theirs.parameters():
        if p.requires_grad:
            p.data = p.grad  # save the gradients as if they were the weights: the file then matches them up by name
    theirs.save_pretrained(tmp_path / "gradients")
    theirs_grads = weft.adapters.trainable(weft.load(copy.deepcopy(base), tmp_path / "gradients"), "default")
    mine = weft.adapters.trainable(ours, "mine")
    assert len(mine) == len(grads) and all(p.grad is not None for p in mine.values())
    for key, p in mine.items():
        if kind.mine == "LoHa" and kind.options.get("use_effective_conv2d") and key[-2:] in ("a1", "a2"):
            continue  # peft's hand-written backward takes the other factor's core there; ours is autograd's own
        assert p.grad is not None and (p.grad - theirs_grads[key]).abs().max() <= 1e-5 * theirs_grads[key].abs().max().clamp_min(1e-1), key

    jolt(nn.ModuleList(weft.adapters.attached(ours, "mine").values()), seed=2)
    weft.save(ours, tmp_path / "ours", name="mine")
    known = set(json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()))
    assert set(json.loads((tmp_path / "ours" / "adapter_config.json").read_text())) <= known, "no key that peft does not know"
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        want = _logits(back, x)
        assert (_logits(ours, x) - want).abs().max() <= 1e-6 * want.abs().max().clamp_min(1)


def test_several_ia3_multiply_as_in_peft(tmp_path: Path) -> None:
    base = llama()
    model, x = copy.deepcopy(base), _inputs(base)
    for seed, name in enumerate(("a", "b")):
        weft.adapt(model, weft.IA3(), name=name)
        jolt(nn.ModuleList(weft.adapters.attached(model, name).values()), seed=seed)
        weft.save(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a").eval()
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.base_model.set_adapter(["a", "b"])
    weft.use(model, ["b", "a"])
    with torch.no_grad():
        both = _logits(model, x)
        assert (both - _logits(theirs, x)).abs().max() <= 2e-6
        weft.merge(model)
        assert (both - _logits(model, x)).abs().max() <= 1e-5


def test_oft_on_convolutions_is_what_peft_merges(tmp_path: Path) -> None:
    """Its forward folds overlapping patches, and differs from its own merged weight even before training."""
    base, x = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.OFTConfig(oft_block_size=9, target_modules=["first"])).eval()
    jolt(theirs)
    theirs.save_pretrained(tmp_path)
    ours = weft.load(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        got = ours(x)
        assert (theirs.merge_and_unload()(x) - got).abs().max() < 1e-5
        assert (got - base(x)).abs().max() > 1e-5
