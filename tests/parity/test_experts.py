"""LoRA on fused experts: what peft saves for `target_parameters` loads here and the reverse, with the same logits and gradients."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import weft
from tests.conftest import jolt
from tests.parity.families import FAMILIES
from tests.parity.quiet import PEFTS_OWN
from weft.adapters import attached, trainable
from weft.quant import quantise_

pytestmark = PEFTS_OWN
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].make().eval()


def _logits(model: nn.Module) -> torch.Tensor:
    return model(**FAMILIES["Mixtral"].inputs()).logits


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
@pytest.mark.parametrize("named", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate-up", "down"])
@pytest.mark.parametrize("modules", [["q_proj"], []], ids=["and-layers", "alone"])
def test_files_both_ways_and_gradients(family: str, named: list[str], modules: list[str], tmp_path: Path) -> None:
    base = _model(family)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=modules, target_parameters=named, task_type="CAUSAL_LM",
                             rank_pattern={r".*gate_up_proj": 3} if len(named) == 2 else {})  # fmt: skip
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    jolt(theirs, 0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weft.load(copy.deepcopy(base), tmp_path / "theirs", name="mine")
    want = _logits(theirs)
    assert _far(_logits(ours), want) < 1e-6 and not torch.allclose(want, _logits(base), atol=1e-4)
    weft.save(ours, tmp_path / "ours", name="mine")
    assert sorted(json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["target_parameters"]) == sorted(named)
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert _far(_logits(ours), _logits(again)) < 1e-6
    for model in (ours, theirs):
        _logits(model).square().mean().backward()
    for p in (p for p in theirs.parameters() if p.requires_grad):
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = trainable(weft.load(copy.deepcopy(base), tmp_path / "gradients"), "default")
    for key, p in trainable(ours, "mine").items():
        assert p.grad is not None and _far(p.grad, wanted[key]) < 1e-5, key


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
def test_the_contract_on_experts(family: str, tmp_path: Path) -> None:
    model = _model(family)
    kinds, before = {p: type(m) for p, m in model.named_modules()}, _logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    method = weft.LoRA(rank=2, targets=("q_proj",), target_parameters=BOTH)
    for seed, name in enumerate("ab"):
        weft.adapt(model, method, name=name)
        assert torch.allclose(_logits(model), before, atol=1e-6)
        jolt(nn.ModuleList(attached(model, name).values()), seed=seed)
    alone = {}
    for name in ("a", "b"):
        weft.use(model, name)
        alone[name] = _logits(model)
    with torch.no_grad(), weft.rows(model, ["b", "a"]):
        mixed = _logits(model)
    assert torch.allclose(mixed[0], alone["b"][0], atol=1e-5) and torch.allclose(mixed[1], alone["a"][1], atol=1e-5)
    weft.use(model, ["a", "b"])
    both = _logits(model)
    weft.use(model, ["b", "a"])
    assert torch.allclose(_logits(model), both, atol=1e-6)
    weft.merge(model)
    assert torch.allclose(_logits(model), both, atol=1e-5)
    weft.unmerge(model)
    weft.remove(model)
    assert {p: type(m) for p, m in model.named_modules()} == kinds
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(_logits(model), before)


def test_packed_experts() -> None:
    model = _model("Mixtral")
    quantise_(model, "nf4", block=32)
    before = _logits(model)
    weft.adapt(model, weft.LoRA(rank=2, targets=(), target_parameters=BOTH))
    assert torch.allclose(_logits(model), before, atol=1e-6)
    jolt(nn.ModuleList(attached(model, "default").values()))
    assert not torch.allclose(_logits(model), before, atol=1e-3)
    _logits(model).square().mean().backward()
    assert all(p.grad is not None for p in trainable(model, "default").values())


class Table(nn.Module):
    """A parameter of two dimensions that is no layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table.T


def test_a_matrix_that_is_no_layer_s(tmp_path: Path) -> None:
    inner, x = Table(), torch.randn(3, 4)
    model = nn.Sequential(inner)
    weft.adapt(model, weft.LoRA(rank=2, targets=(), target_parameters="table"))
    assert torch.equal(model(x), x @ inner.table.T)
    jolt(nn.ModuleList(attached(model, "default").values()))
    want = model(x)
    weft.save(model, tmp_path)
    again = nn.Sequential(Table())
    again[0].table.data.copy_(inner.table)
    assert torch.equal(weft.load(again, tmp_path)(x), want)
    assert torch.allclose(torch.compile(model, backend="aot_eager")(x), want, atol=1e-6)
    weft.merge(model, keep=False)
    assert torch.allclose(model(x), want, atol=1e-6) and type(inner) is Table


def test_what_is_no_expert_is_told() -> None:
    with pytest.raises(weft.WeftError, match=r"'nothing' matches no parameter(.|\n)*an axis of experts here: down_proj, gate_up_proj"):
        weft.adapt(_model("Mixtral"), weft.LoRA(targets=("q_proj",), target_parameters=("nothing",)))
    with pytest.raises(weft.WeftError, match="dropout is not for parameters"):
        weft.adapt(_model("Mixtral"), weft.LoRA(targets=(), dropout=0.1, target_parameters=BOTH))
    with pytest.raises(weft.WeftError, match="DoRA is not for parameters"):
        weft.adapt(_model("Mixtral"), weft.DoRA(targets=("q_proj",), target_parameters=BOTH))
    with pytest.raises(weft.WeftError, match="q_proj: adapted as a layer by targets and once more"):
        weft.adapt(_model("Mixtral"), weft.LoRA(targets=("q_proj",), target_parameters="q_proj.weight"))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
def test_ranks_and_alphas_by_pattern_both_ways(family: str, tmp_path: Path) -> None:
    base = _model(family)
    ranks = {r".*gate_up_proj": 3, r"layers.1.mlp.experts.down_proj": 1, "q_proj": 4}
    alphas = {r".*\.down_proj": 5, r"layers.0.*gate_up_proj": 2, "layers.1.self_attn.q_proj": 3}
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=BOTH, task_type="CAUSAL_LM",
                             rank_pattern=ranks, alpha_pattern=alphas)  # fmt: skip
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    jolt(theirs, 0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weft.load(copy.deepcopy(base), tmp_path / "theirs", name="mine")
    assert _far(_logits(ours), _logits(theirs)) < 1e-6
    for change in (False, True):
        if change:  # a layer's and an expert's scale that no pattern of the method's describes, so that each is written by itself
            parts: Any = attached(ours, "mine")
            parts["model.layers.0.self_attn.q_proj"].scale *= 1.5
            parts["model.layers.1.mlp.experts"].scales[0] *= 2.5
            assert _far(_logits(ours), _logits(theirs)) > 1e-4
        weft.save(ours, tmp_path / f"ours{change}", name="mine")
        again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"ours{change}").eval()
        assert _far(_logits(again), _logits(ours)) < 1e-6
        assert _far(_logits(weft.load(copy.deepcopy(base), tmp_path / f"ours{change}")), _logits(ours)) < 1e-6
