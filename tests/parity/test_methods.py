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

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in (
        "`is_gradient_checkpointing` is deprecated",
        ".*fan_in_fan_out",
        "Could not find a config file",
        "Model has `tie_word_embeddings",
        "Unsupported layer type",
        "Unable to fetch remote file",
    )
]


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
    "ln": Kind(llama, peft.LNTuningConfig, {}, "LNTuning"),
    "ln-gpt2": Kind(gpt2, peft.LNTuningConfig, {}, "LNTuning"),
    "ln-plain": Kind(Plain, peft.LNTuningConfig, dict(target_modules=["norm"]), "LNTuning"),
}


def _inputs(model: nn.Module) -> Tensor:
    torch.manual_seed(5)
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
        assert (got - _logits(base, x)).abs().max() > 1e-3

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
