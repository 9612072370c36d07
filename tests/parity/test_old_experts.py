"""LoRA files from when every expert was a module of linear layers: on fused experts they compute what those layers computed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weft
from tests.parity.quiet import PEFTS_OWN
from tests.parity.test_experts import _far, _logits, _model
from weft.adapters import attached

pytestmark = PEFTS_OWN
NAMES = {  # the block's name then, and the gate's, the up's and the down's
    "Mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "Qwen3-MoE": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def _old_file(folder: Path, family: str, base: nn.Module, config: dict[str, Any], leave_out: tuple[str, ...] = ()) -> Any:
    """Write a file as it was written then, and return the plain model that it means: the sums are made here, one expert after another."""
    meant: Any = copy.deepcopy(base)
    block, parts = NAMES[family]
    targets, ranks, alphas = config["target_modules"], config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    tensors: dict[str, Tensor] = {}

    def update(path: str, weight: Tensor) -> None:
        """Give the linear layer that was at `path` factors, and add their product to what is its weight now."""
        name = path.rpartition(".")[2]
        if name not in targets or any(part in path for part in leave_out):
            return
        rank = next((r for key, r in ranks.items() if path.endswith(key)), config["r"])
        alpha = next((a for key, a in alphas.items() if path.endswith(key)), config["lora_alpha"])
        A, B = torch.randn(rank, weight.shape[1]) / 3, torch.randn(weight.shape[0], rank) / 3
        tensors[f"base_model.model.{path}.lora_A.weight"], tensors[f"base_model.model.{path}.lora_B.weight"] = A, B
        weight += alpha / (rank**0.5 if config.get("use_rslora") else rank) * (B @ A)

    with torch.no_grad():
        for i, layer in enumerate(meant.model.layers):
            at = f"model.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                update(f"{at}.self_attn.{name}", layer.self_attn.get_submodule(name).weight)
            update(f"{at}.{block}.gate", layer.mlp.gate.weight)
            experts: Any = layer.mlp.experts
            for e in range(experts.gate_up_proj.shape[0]):
                gate, up = experts.gate_up_proj[e].chunk(2)
                for name, weight in zip(parts, (gate, up, experts.down_proj[e]), strict=True):
                    update(f"{at}.{block}.experts.{e}.{name}", weight)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None} | config
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return meant


@pytest.mark.parametrize("family", list(NAMES))
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "lora_alpha": 3}, {"router": True}, {"alone": True}], ids=str)
def test_what_it_meant_and_what_peft_makes_of_it(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    base, more = _model(family), dict(more)
    router, alone = more.pop("router", False), more.pop("alone", False)
    targets = [*(() if alone else ("q_proj", "o_proj")), *NAMES[family][1], *(("gate",) if router else ())]
    meant = _old_file(tmp_path / "old", family, base, {"r": 2, "lora_alpha": 5, "target_modules": targets} | more)
    want = _logits(meant)
    ours = weft.load(copy.deepcopy(base), tmp_path / "old", name="mine")
    assert _far(_logits(ours), want) < 1e-5 and _far(_logits(base), want) > 1e-3
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old").eval()
    # with rsLoRA peft 0.21.2 doubles rank and alpha, which leaves another scale
    assert _far(_logits(theirs), want) > 1e-3 if more else _far(_logits(theirs), want) < 1e-5
    weft.save(ours, tmp_path / "new", name="mine")
    back: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new").eval()
    for again in (weft.load(copy.deepcopy(base), tmp_path / "new"), back):
        assert _far(_logits(again), want) < 1e-5
    weft.merge(ours)
    assert _far(_logits(ours), want) < 1e-5


@pytest.mark.parametrize("family", list(NAMES))
def test_ranks_by_pattern_and_parts_that_are_left_out(family: str, tmp_path: Path) -> None:
    """Gates without ups, which peft 0.21.2 refuses; ranks and alphas of their own; experts without an adapter."""
    base, (gate, up, down) = _model(family), NAMES[family][1]
    for i, (targets, more, leave_out) in enumerate([
        ([gate], {}, ()),
        ([up, "q_proj"], {}, ()),
        ([gate, up, down], {"rank_pattern": {gate: 3, f"layers.1.{NAMES[family][0]}.experts.2.{down}": 1}, "alpha_pattern": {up: 7}}, ()),
        ([gate, up, down], {}, ("experts.1.", "layers.0")),
    ]):  # fmt: skip
        meant = _old_file(tmp_path / str(i), family, base, {"r": 2, "lora_alpha": 5, "target_modules": targets} | more, leave_out)
        want = _logits(meant)
        if targets == [gate]:
            with pytest.raises(ValueError, match="Cannot convert PEFT target"):
                peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(i))
        ours = weft.load(copy.deepcopy(base), tmp_path / str(i))
        assert _far(_logits(ours), want) < 1e-5 and _far(_logits(base), want) > 1e-3
        weft.save(ours, tmp_path / f"new{i}")
        assert _far(_logits(weft.load(copy.deepcopy(base), tmp_path / f"new{i}")), want) < 1e-5
        theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"new{i}").eval()
        assert _far(_logits(theirs), want) < 1e-5, "and peft loads what weft made of it"


@pytest.mark.parametrize("targets", ["all-linear", r"re"], ids=["all-linear", "regular expression"])
def test_targets_that_are_no_list(targets: str, tmp_path: Path) -> None:
    base = _model("Mixtral")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"] if targets == "all-linear" else ["v_proj", "w1", "w2", "w3"]
    want = _logits(_old_file(tmp_path, "Mixtral", base, {"r": 2, "lora_alpha": 5, "target_modules": names}))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = targets if targets == "all-linear" else r".*\.(v_proj|w[123])"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = weft.load(base, tmp_path)
    assert _far(_logits(ours), want) < 1e-5
    method: Any = next(iter(attached(ours, "default").values())).method
    assert method.rank == 2 and set(method.rank_pattern.values()) <= {2, 4}


def test_on_packed_experts_and_with_dropout(tmp_path: Path) -> None:
    base = _model("Mixtral")
    config = {"r": 2, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": ["w1", "w2", "w3"]}
    _old_file(tmp_path, "Mixtral", base, config)
    weft.quant.quantise_(base, "int8")
    with pytest.warns(UserWarning, match="dropout is 0 from now on"):
        plain, packed = weft.load(copy.deepcopy(base), tmp_path), weft.load(base, tmp_path)
    assert _far(_logits(packed), _logits(weft.merge(plain))) < 1e-5


def test_what_does_not_fit_is_told_and_nothing_is_changed(tmp_path: Path) -> None:
    base = _model("Mixtral")
    keys = list(base.state_dict())
    _old_file(tmp_path, "Mixtral", base, {"r": 2, "lora_alpha": 5, "target_modules": ["w1", "w2", "w3"]})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(weft.WeftError, match=r"experts\.0\.w1\.lora_A\.weight is \(2, 16\); this model(.*) needs \(3, 16\)"):
        weft.load(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(weft.WeftError, match="DoRA is not for parameters"):
        weft.load(base, tmp_path)
    assert list(base.state_dict()) == keys
