"""convert and extract: a plain LoRA of whatever is a change of weights, with what it keeps; from models and from folders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.conftest import ConvNet, Plain, gpt2, jolt, llama
from tests.contract.test_contract import METHODS_TRIED
from weft.adapters import attached
from weft.core import is_linear


def _out(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Any = model(x)
    return y.logits if hasattr(y, "logits") else y


EXACT: dict[str, tuple[Callable[[], nn.Module], weft.Method, int]] = {
    "rslora": (llama, weft.LoRA(rank=4, rslora=True, alpha=5, targets=["q_proj", "embed_tokens"]), 4),
    "biases": (gpt2, weft.LoRA(rank=3, targets="c_fc", bias="lora_only"), 3),
    "lora-bias": (lambda: Plain().eval(), weft.LoRA(rank=3, targets="up", lora_bias=True), 3),
    "dora": (llama, weft.DoRA(rank=2, targets="k_proj"), 16),
    "ia3": (llama, weft.IA3(targets=["k_proj", "v_proj"]), 16),
    "full": (llama, weft.Full(targets="v_proj"), 16),
    "full-conv": (lambda: ConvNet().eval(), weft.Full(targets=["first", "out"]), 12),
    "grouped": (lambda: ConvNet().eval(), weft.LoRA(rank=8, targets=["second", "third"]), 8),
}


@pytest.mark.parametrize("kind", EXACT)
def test_at_full_rank_nothing_is_lost(kind: str, ids: Tensor) -> None:
    make, method, rank = EXACT[kind]
    torch.manual_seed(0)
    model = weft.adapt(make(), method, "some")
    jolt(model, 0.2)
    x = torch.randn(3, 3, 8, 8) if isinstance(model, ConvNet) else ids
    bare, want = _out(weft_free(model), x), _out(model, x)
    assert (bare - want).abs().max() > 1e-3
    kept = weft.convert(model, "some", rank=rank)
    assert weft.adapters.active(model) == ("some-lora",) and kept.energy == pytest.approx(1, abs=1e-5)
    assert torch.allclose(_out(model, x), want, atol=2e-4)
    assert {type(a.method) for a in attached(model, "some-lora").values()} == {weft.LoRA}


def weft_free(model: nn.Module) -> nn.Module:
    free = copy.deepcopy(model)
    weft.remove(free)
    return free


def test_a_lower_rank_keeps_what_it_says() -> None:
    model = weft.adapt(llama(), weft.Full(targets=["q_proj", "norm"]), "full")
    jolt(model)
    kept = weft.convert(model, "full", rank=4, to="small")
    for path, part in attached(model, "small").items():
        wanted = attached(model, "full")[path].weight.detach() - model.get_submodule(path).weight
        S = torch.linalg.svdvals(wanted)
        assert kept.layers[path].kept == pytest.approx(float(S[:4].square().sum() / S.square().sum()), rel=1e-3)
        assert (part.scale * (part.B @ part.A).norm()).item() == pytest.approx(float(S[:4].norm()), rel=1e-3)
    assert len(kept.notes) == 1 and kept.notes[0].startswith("model.norm.weight changed by")
    energy = weft.convert(model, "full", to="most", energy=0.9)
    assert all(x.kept >= 0.8999 for x in energy.layers.values())
    ranks = {a.A.shape[0] for a in attached(model, "most").values()}
    assert max(ranks) < 32 and energy.energy < 0.95


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("a rank of 0", lambda m: weft.convert(m, "full", rank=0)),
        ("energy=1.5", lambda m: weft.convert(m, "full", energy=1.5)),
        ("not both", lambda m: weft.convert(m, "full", 4, energy=0.5)),
        ("no adapter named 'nobody'", lambda m: weft.convert(m, "nobody")),
        ("named 'full' already", lambda m: weft.convert(m, "full", to="full")),
        ("no LoRA can hold it", lambda m: weft.convert(m, "norm")),
        ("has the same weights as", lambda m: weft.extract(m, llama())),
        (r"q_proj.weight is \(64, 64\) in this", lambda m: weft.extract(m, llama(hidden_size=64, head_dim=16))),
        ("layers.1.self_attn.q_proj.weight is missing from", lambda m: weft.extract(m, llama(num_hidden_layers=1))),
        ("needs output=", lambda m: weft.extract("embedded", m)),
        ("is no folder here", lambda m: weft.extract(m, "no-such-folder")),
        ("'q_prj' matches no module", lambda m: weft.extract(m, llama(1), targets="q_prj")),
    ],
)
def test_what_is_refused(words: str, wrong: Callable[[nn.Module], Any]) -> None:
    model = weft.adapt(weft.adapt(llama(), weft.Full(targets="norm"), "norm"), weft.Full(targets="q_proj"), "full")
    jolt(nn.ModuleList(attached(model, "norm").values()))
    with pytest.raises(weft.WeftError, match=words):
        wrong(model)
    assert {*weft.adapters.names(model)} == {"norm", "full"}


def _tuned(base: nn.Module, rank: int = 2) -> nn.Module:
    """Every linear layer moved by a matrix of low rank, and one norm by a little."""
    tuned: Any = copy.deepcopy(base)
    torch.manual_seed(4)
    with torch.no_grad():
        for path, m in tuned.named_modules():
            if is_linear(m) and "lm_head" not in path:
                m.weight += 0.1 * torch.randn(m.weight.shape[0], rank) @ torch.randn(rank, m.weight.shape[1])
        next(m for path, m in tuned.named_modules() if path.endswith(("norm", "ln_f"))).weight += 0.01
    return tuned


@pytest.mark.parametrize("make", [llama, gpt2])
def test_extract_finds_the_low_rank_difference(make: Callable[[], nn.Module], tmp_path: Path, ids: Tensor) -> None:
    base: Any = make()
    tuned: Any = _tuned(base)
    kept = weft.extract(base, tuned, rank=2)
    assert kept.energy == pytest.approx(1, abs=1e-5) and len(kept.notes) == 2
    assert "weight (32 numbers) changed by 0.01 of its norm: left out" in kept.notes[0] and "32 numbers are left out" in kept.notes[1]
    got, want = _out(base, ids), _out(tuned, ids)
    assert (got - want).abs().max() < 0.2 * (want - _out(weft_free(base), ids)).abs().max()
    weft.remove(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    from_folders = weft.extract(tmp_path / "base", tmp_path / "tuned", rank=2, output=tmp_path / "adapter")
    assert {p: x.rank for p, x in from_folders.layers.items()} == {p: x.rank for p, x in kept.layers.items()}
    assert torch.allclose(_out(weft.load(base, tmp_path / "adapter"), ids), got, atol=1e-4)


def test_extract_by_energy_and_what_is_broken(tmp_path: Path) -> None:
    base, tuned = llama(0), llama(1)
    kept = weft.extract(base, tuned, energy=0.8, targets=["q_proj", "down_proj"])
    assert set(kept.layers) == {p for p, _ in base.named_modules() if p.endswith(("q_proj", "down_proj"))}
    assert all(0.7999 <= x.kept < 0.9 for x in kept.layers.values())
    assert any("model.layers.*.mlp.up_proj.weight (2 tensors, 3,072 numbers) changed by up to" in note for note in kept.notes)
    tuned.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(weft.WeftError, match=r"layers.1.mlp.up_proj.weight has numbers that are not finite in this Llama"):
        weft.extract(llama(0), tuned)


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_what_was_cast_to_bf16_whole_works_merges_and_converts(name: str, ids: Tensor) -> None:
    method = METHODS_TRIED[name]("llama")
    model = weft.adapt(llama(), method, "some")
    jolt(model)
    want = _out(model, ids)
    model.to(torch.bfloat16)
    assert (_out(model, ids) - want).norm() < 0.05 * want.norm()
    if not method.mergeable:
        return
    with torch.no_grad():
        exact = {p: a.float().merged(copy.deepcopy(model).get_submodule(p)) for p, a in attached(copy.deepcopy(model), "some").items()}
    weft.merge(model)
    for path, held in exact.items():
        for key, value in held.items():
            own = model.get_submodule(path)._parameters[key]
            assert own is None or torch.equal(own, value.to(torch.bfloat16)), path  # formed in fp32, rounded once
    weft.unmerge(model)
    try:
        kept = weft.convert(model, "some", rank=32)
    except weft.WeftError as e:
        assert "holds no change of a linear layer" in str(e)
        return
    assert (_out(model, ids) - want).norm() < 0.05 * want.norm() or kept.notes  # of norms, which no LoRA holds
