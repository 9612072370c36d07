"""Packed layers that are no nn.Linear: Conv1D of transformers (GPT-2) and fused experts (Mixtral). What holds on plain ones holds there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import weft
from tests.conftest import gpt2, jolt
from tests.contract.test_contract import METHODS_TRIED
from weft.adapters import attached, trainable
from weft.quant import Quantised, dense, is_quantised, quantise_

BASES: dict[str, dict[str, Any]] = {"nf4": dict(block=32), "int8": {}}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


FUSED = ("experts.gate_up_proj", "experts.down_proj")
ON_EXPERTS: dict[str, Callable[[], weft.Method]] = {
    "experts": lambda: weft.LoRA(rank=2, targets=(), target_parameters=FUSED),
    "experts-and-layers": lambda: weft.LoRA(
        rank=3, targets=("q_proj", "o_proj"), target_parameters=FUSED, rank_pattern={"experts.down_proj": 1}, rslora=True),
    "experts-in-part": lambda: weft.LoRA(rank=2, targets=("v_proj",), target_parameters=FUSED[1:], modules_to_save="norm"),
    "experts-and-router": lambda: weft.LoRA(rank=2, targets=(), target_parameters=(*FUSED, "gate.weight")),
    "layers": lambda: weft.LoRA(rank=2),
    "dora": lambda: weft.DoRA(rank=2),
    "ia3": lambda: weft.IA3(targets=("k_proj", "v_proj"), feedforward=()),
    "full": lambda: weft.Full(),
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "mixtral": mixtral}
TRIED = [f"{method}/{base}/gpt2" for method in METHODS_TRIED for base in BASES] + [f"{m}/{b}/mixtral" for m in ON_EXPERTS for b in BASES]


class Case:
    def __init__(self, named: str) -> None:
        name, self.base, self.model = named.split("/")
        self.method = METHODS_TRIED[name]("gpt2") if self.model == "gpt2" else ON_EXPERTS[name]()

    def packed(self) -> nn.Module:
        model = MODELS[self.model]()
        report = quantise_(model, self.base, **BASES[self.base])
        kinds = {type(m).own.__name__ for m in model.modules() if isinstance(m, Quantised)}
        assert kinds == ({"Conv1D"} if self.model == "gpt2" else {"MixtralExperts", "Linear"}) and report.layers
        return model

    def plain(self, packed: nn.Module) -> nn.Module:
        """The plain model of the same numbers."""
        model = MODELS[self.model]()
        for path, module in packed.named_modules():
            for name in module.shapes if isinstance(module, Quantised) else ():
                model.get_submodule(path)._parameters[name].data.copy_(dense(module, name))
        return model

    def adapted(self, model: nn.Module) -> nn.Module:
        torch.manual_seed(5)
        weft.adapt(model, self.method)
        jolt(model, size=0.03)
        return model


def run(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    return logits


@pytest.fixture(params=TRIED)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_as_on_the_plain_model_of_the_same_numbers(case: Case, ids: Tensor, tmp_path: Path) -> None:
    model = case.packed()
    before, state = run(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.allclose(before, run(case.plain(model), ids), atol=1e-5)
    twin = case.adapted(case.plain(model))
    case.adapted(model)
    for each in (model, twin):
        run(each, ids).square().mean().backward()
    want = run(model, ids)
    assert torch.allclose(want, run(twin, ids), atol=1e-5) and not torch.allclose(want, before, atol=1e-3)
    for mine, its in zip(trainable(model, "default").values(), trainable(twin, "default").values(), strict=True):
        assert (mine.grad is None) == (its.grad is None)
        if mine.grad is not None and its.grad is not None:
            assert torch.allclose(mine.grad, its.grad, atol=1e-5 * its.grad.abs().max().item() + 1e-6)
    with weft.using(model, None):
        assert torch.equal(run(model, ids), before)
    weft.save(model, tmp_path)
    assert torch.allclose(run(weft.load(case.packed(), tmp_path), ids), want, atol=1e-6)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, ids), want)
    weft.remove(model)
    assert torch.equal(run(model, ids), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and len(state) == len(model.state_dict())


def test_merging_and_unmerging(case: Case, ids: Tensor) -> None:
    model = case.adapted(case.packed())
    packed = {p for p, m in model.named_modules() if is_quantised(m)}
    before = [(p, n) for p, m in model.named_modules() if isinstance(m, Quantised) for n in m.shapes]
    state, want = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}, run(model, ids)
    if not case.method.mergeable:
        with pytest.raises(weft.WeftError, match="no change of weights"):
            weft.merge(model)
        assert {p for p, m in model.named_modules() if is_quantised(m)} == packed and torch.equal(run(model, ids), want)
        return
    weft.merge(model)
    assert torch.allclose(run(model, ids), want, atol=5e-5)
    with pytest.raises(weft.WeftError, match="merged into this base already"):
        weft.merge(model)
    with pytest.raises(weft.WeftError, match=r"weft\.unmerge\(model\) first"):
        weft.remove(model)
    weft.unmerge(model)
    assert torch.equal(run(model, ids), want)
    for key, value in model.state_dict().items():
        assert value.data_ptr() == state[key][0] and torch.equal(value, state[key][1]), key
    changed = {(p, n) for p, adapter in attached(model, "default").items() for n in adapter.merged(model.get_submodule(p))}
    weft.merge(model, keep=False)
    assert torch.allclose(run(model, ids), want, atol=5e-5)
    now = {(p, n): isinstance(m, Quantised) and m.is_packed(n) for p, m in model.named_modules() for n in m._parameters}
    assert {p for (p, n), is_packed in now.items() if is_packed} <= packed
    assert not any(now[where] for where in changed), "what was merged into holds numbers, and nothing else does"
    assert all(now[p, n] for p, n in before if (p, n) not in changed)
