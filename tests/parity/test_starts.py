"""LoRA that starts from the base's weight, and LoRA-FA: against peft, through files, through combining, on a packed base, and misuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from tests.conftest import Plain, gpt2, jolt, llama
from tests.parity.test_lora import pytestmark as pytestmark
from weft.adapters import attached, trainable
from weft.adapters.files import WEIGHTS
from weft.kernels.low_rank import low_rank_add_reference
from weft.quant import quantise_

STARTS = [
    ("pissa", dict(r=4, lora_alpha=6), dict(rank=4, alpha=6.0)),
    ("olora", dict(r=4, lora_alpha=2, use_rslora=True), dict(rank=4, alpha=2.0, rslora=True)),
]


def descend(model: nn.Module, own: list[Tensor], ids: Tensor, steps: int = 2) -> Tensor:
    """Logits after some steps of plain gradient descent: they do not depend on the signs of singular vectors."""
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        for p, g in zip(own, torch.autograd.grad(loss, own), strict=True):
            p.data -= 2.0 * g
    return model(ids).logits.detach()


# peft decomposes GPT-2's weights as they lie, (in, out), for OLoRA: there it fails
CASES = [(llama, *s) for s in STARTS] + [(gpt2, *STARTS[0])]


@pytest.mark.parametrize(("make", "init", "theirs", "ours"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_it_learns_as_in_peft_and_its_file_is_plain(init, theirs, ours, make, ids, tmp_path: Path) -> None:
    base, targets = make(), ["q_proj", "down_proj"] if make is llama else ["c_attn", "c_fc"]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=init, fan_in_fan_out=make is gpt2, **theirs)
    its = peft.get_peft_model(copy.deepcopy(base), config)
    want = descend(its, [p for p in its.parameters() if p.requires_grad], ids)
    model = weft.adapt(copy.deepcopy(base), weft.LoRA(targets=targets, init=init, **ours))
    got = descend(model, list(trainable(model, "default").values()), ids)
    assert (got - base(ids).logits).abs().max() > 1e-3
    assert torch.allclose(got, want, atol=2e-4)
    weft.save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == 2 * ours["rank"] and written["init_lora_weights"] is True
    assert not written["rank_pattern"] and not written["alpha_pattern"], "vLLM does not read patterns"
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(loaded(ids).logits, got, atol=1e-5)


def test_at_the_start_nothing_changes_in_any_precision_and_a_seed_says_all(ids) -> None:
    base = llama(dtype=torch.bfloat16)
    before = base(ids).logits
    starts = []
    for name in ("a", "b"):
        torch.manual_seed(3)
        weft.adapt(base, weft.LoRA(rank=4, init="pissa_niter_2"), name=name)
        assert torch.equal(base(ids).logits, before)
        starts.append(trainable(base, name))
    assert all(torch.equal(p, q) for p, q in zip(starts[0].values(), starts[1].values(), strict=True))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_6"])
def test_pissa_holds_the_largest_part_of_the_weight(init: str) -> None:
    model = Plain()
    with torch.no_grad():
        model.up.weight *= 0.7 ** torch.arange(model.up.in_features)
    weft.adapt(model, weft.LoRA(rank=3, alpha=5.0, init=init, targets="up"))
    (adapter,) = attached(model, "default").values()
    S = torch.linalg.svdvals(model.up.weight.detach())
    rest = model.up.weight - adapter.scale * adapter.B @ adapter.A
    assert torch.allclose(rest.norm(), S[3:].norm(), rtol=1e-4)


def test_combining_and_converting_see_the_start(ids) -> None:
    model = weft.adapt(llama(), weft.LoRA(rank=3, init="pissa"), name="a")
    jolt(model)
    weft.adapt(model, weft.LoRA(rank=2), name="b")
    jolt(nn.ModuleList(attached(model, "b").values()))
    with weft.using(model, ["a", "b"]):
        want = model(ids).logits
    weft.combine(model, {"a": 1.0, "b": 1.0}, name="both")
    assert torch.allclose(model(ids).logits, want, atol=2e-5)
    with weft.using(model, "a"):
        want = model(ids).logits
    weft.convert(model, "a", rank=6)
    with weft.using(model, "a-lora"):
        assert torch.allclose(model(ids).logits, want, atol=2e-5)


def test_on_a_packed_base_the_bytes_stay(ids) -> None:
    base = llama()
    quantise_(base, "nf4")
    state, before = {k: v.clone() for k, v in base.state_dict().items()}, base(ids).logits
    weft.adapt(base, weft.LoRA(rank=4, init="pissa"))
    assert torch.equal(base(ids).logits, before)
    jolt(base)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in state.items())


def test_a_frozen_A_is_in_the_file_and_not_in_training(ids, tmp_path: Path) -> None:
    base = llama()
    model = weft.adapt(copy.deepcopy(base), weft.LoRA(rank=4, train_A=False))
    assert {k.rpartition(".")[2] for k in trainable(model, "default")} == {"B"}
    jolt(model)
    weft.save(model, tmp_path)
    assert torch.allclose(peft.PeftModel.from_pretrained(base, tmp_path)(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("kind", [weft.LoRA, weft.DoRA])
def test_what_peft_has_no_field_for_is_kept_and_says_nothing_to_peft(kind, ids, tmp_path: Path) -> None:
    base = llama()
    model = weft.adapt(copy.deepcopy(base), kind(rank=4, train_A=False, lr_ratio=16, targets="q_proj"))
    jolt(model)
    weft.save(model, tmp_path / "one")
    again = weft.load(copy.deepcopy(base), tmp_path / "one")  # warnings are errors here, peft's too
    method = next(iter(attached(again, "default").values())).method
    assert (method.train_A, method.lr_ratio) == (False, 16)
    assert {k.rpartition(".")[2] for k in trainable(again, "default")} == {"B", "m"} - ({"m"} if kind is weft.LoRA else set())
    for _ in range(6):  # safetensors itself writes the header in another order each time
        weft.save(again, tmp_path / "two")
        assert (tmp_path / "two" / WEIGHTS).read_bytes() == (tmp_path / "one" / WEIGHTS).read_bytes()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=1e-5)
    weft.save(weft.adapt(llama(), kind(rank=4, targets="q_proj")), tmp_path / "plain")
    with safe_open(tmp_path / "plain" / WEIGHTS, "pt") as plain, safe_open(tmp_path / "one" / WEIGHTS, "pt") as noted:
        assert plain.metadata() == {"format": "pt"} and noted.metadata()["format"] == "pt"


def test_notes_that_are_damaged_or_new(tmp_path: Path) -> None:
    weft.save(weft.adapt(llama(), weft.LoRA(rank=2, targets="q_proj")), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for notes in ("{", "[]", '{"train_A": "no"}', '{"lr_ratio": null}'):
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt", "weft": notes})
        with pytest.raises(weft.WeftError, match="no set of hyper-parameters"):
            weft.load(llama(), tmp_path)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt", "weft": '{"train_A": false, "train_C": 1}'})
    with pytest.warns(UserWarning, match="does not know: train_C"):
        model = weft.load(llama(), tmp_path)
    assert {k.rpartition(".")[2] for k in trainable(model, "default")} == {"B"}


@pytest.mark.parametrize("train_A", [True, False])
def test_with_a_frozen_A_no_input_is_kept_for_the_backward_pass(train_A: bool) -> None:
    layer = nn.Sequential(nn.Linear(64, 32))
    model = weft.adapt(layer, weft.LoRA(rank=2, train_A=train_A))
    jolt(model)
    x = torch.randn(5, 3, 64)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = model(x)
    parameters = 2 * 64 + 2 * 32  # A and B
    assert sum(sizes) == parameters + 5 * 3 * 2 + (x.numel() if train_A else 0)  # and xAᵀ
    adapter = attached(model, "default")["0"]
    wanted = torch.autograd.grad((low_rank_add_reference(model[0].frozen(x), x, adapter.A, adapter.B, adapter.scale) ** 2).sum(), adapter.B)
    (y**2).sum().backward()
    assert torch.allclose(adapter.B.grad, wanted[0], rtol=1e-5, atol=1e-5) and (adapter.A.grad is None) is not train_A


def test_misuse_is_told(tmp_path: Path) -> None:
    for init in ("pisa", "pissa_niter_0"):
        with pytest.raises(weft.WeftError, match="there are kaiming"):
            weft.LoRA(init=init)
    with pytest.raises(weft.WeftError, match="no more than 32 directions"):
        weft.adapt(llama(), weft.LoRA(rank=40, init="olora"))
    with pytest.raises(weft.WeftError, match="for linear layers"):
        weft.adapt(llama(), weft.LoRA(init="pissa", targets="embed_tokens"))
    with pytest.raises(weft.WeftError, match="pissa with DoRA"):
        weft.adapt(llama(), weft.DoRA(init="pissa"))
    with pytest.raises(weft.WeftError, match="would stay there"):
        weft.adapt(llama(), weft.LoRA(train_A=False, targets="embed_tokens"))
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")).save_pretrained(tmp_path)
    with pytest.raises(weft.WeftError, match="path_initial_model_for_weight_conversion"):
        weft.load(llama(), tmp_path)
