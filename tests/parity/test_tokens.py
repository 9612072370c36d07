"""Trainable tokens, alone and beside LoRA: what peft saves loads here and the reverse, with the same logits and gradients."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from tests.conftest import Plain, gpt2, jolt, llama
from tests.parity.families import FAMILIES
from tests.parity.quiet import PEFTS_OWN
from weft.adapters import attached, trainable
from weft.quant import quantise_

pytestmark = PEFTS_OWN
IDS = torch.arange(3, 31).view(4, 7)
TOKENS = [12, 5, 30, 1]  # not in order, and one that is not in the batch


def _family(name: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[name].make().eval()


def _tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


MODELS: dict[str, Any] = {
    "untied": llama, "tied": _tied, "gpt2": gpt2, "gemma": lambda: _family("Gemma 3"), "bart": lambda: _family("BART"),
    "t5": lambda: _family("T5"), "opt": lambda: _family("OPT"), "bert": lambda: _family("BERT"), "plain": lambda: Plain().eval(),
}  # fmt: skip
KINDS: dict[str, Any] = {
    "alone": lambda named, where: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=where),
    "lora": lambda named, where: peft.LoraConfig(r=2, target_modules=named, trainable_token_indices=beside(where)),
    "dora": lambda named, where: peft.LoraConfig(r=2, use_dora=True, target_modules=named, trainable_token_indices=beside(where)),
    "adalora": lambda named, where: peft.AdaLoraConfig(
        init_r=2, target_r=2, total_step=9, target_modules=named, trainable_token_indices=beside(where)),
}  # fmt: skip
NAMED = dict(gpt2="c_attn", bart="q_proj", t5="q", bert="query", plain="up")


def beside(where: list[str] | None) -> Any:
    return TOKENS if where is None else dict.fromkeys(where, TOKENS)


def out(model: nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else {}
    y: Any = model(IDS, **more)
    return y.logits if hasattr(y, "logits") else y


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_both_ways_and_gradients(kind: str, model: str, tmp_path: Path) -> None:
    base = MODELS[model]()
    config = KINDS[kind]([NAMED.get(model, "q_proj")], ["embed"] if model == "plain" else None)
    config.task_type = "SEQ_CLS" if model == "bert" else None
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    jolt(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weft.load(copy.deepcopy(base), tmp_path / "theirs", name="mine")
    want = out(theirs)
    assert far(out(ours), want) < 1e-6 and far(want, out(base)) > 1e-4
    weft.save(ours, tmp_path / "ours", name="mine")
    mine, its = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in its)
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert far(out(ours), out(again)) < 1e-6
    for one in (ours, theirs):
        out(one).square().mean().backward()
    for p in (p for p in theirs.parameters() if p.requires_grad):
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = trainable(weft.load(copy.deepcopy(base), tmp_path / "gradients"), "default")
    assert wanted.keys() == trainable(ours, "mine").keys()
    for key, p in trainable(ours, "mine").items():
        assert p.grad is not None and far(p.grad, wanted[key]) < 1e-5, key


BY_NAME: dict[str, dict[str, list[int]]] = {
    "both": {"embed_tokens": [5, 12], "lm_head": [4]}, "alike": {"embed_tokens": [5, 12], "lm_head": [5, 12]}, "head": {"lm_head": [4, 9]},
}  # fmt: skip


@pytest.mark.parametrize("model", ["untied", "tied"])
@pytest.mark.parametrize("named", BY_NAME)
def test_tokens_by_the_name_of_a_module(named: str, model: str, tmp_path: Path) -> None:
    base = MODELS[model]()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=BY_NAME[named])
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    jolt(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weft.load(copy.deepcopy(base), tmp_path / "theirs")
    assert far(out(ours), out(theirs)) < 1e-6
    weft.save(ours, tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert far(out(again), out(theirs)) < 1e-6
    assert torch.equal(out(weft.load(copy.deepcopy(base), tmp_path / "ours")), out(ours))


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_an_embedding_and_a_head_that_are_named(model: str, tmp_path: Path) -> None:
    base = MODELS[model]()
    ours = weft.adapt(copy.deepcopy(base), weft.TrainableTokens(tokens=(5, 12), targets=("embed_tokens", "lm_head")))
    jolt(nn.ModuleList(attached(ours, "default").values()), 0.3)
    assert len(trainable(ours, "default")) == (1 if model == "tied" else 2)
    weft.save(ours, tmp_path)
    assert torch.equal(out(weft.load(copy.deepcopy(base), tmp_path)), out(ours))
    if model == "untied":  # of a head that is tied and named peft makes layers that cannot compute
        theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert far(out(ours), out(theirs)) < 1e-6


def test_what_is_tied_stays_tied_when_it_is_merged() -> None:
    for method in (weft.TrainableTokens(tokens=(5, 12)), weft.LoRA(rank=2, trainable_token_indices=(5, 12))):
        model = weft.adapt(_tied(), method)
        jolt(nn.ModuleList(attached(model, "default").values()), 0.3)
        want = out(model)
        weft.merge(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight and far(out(model), want) < 1e-5
        weft.unmerge(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(out(model), want)
    with pytest.raises(weft.WeftError, match="untie=True"):
        weft.merge(weft.adapt(_tied(), weft.TrainableTokens(tokens=(5,), targets="lm_head")))


def test_several_adapters_and_their_order() -> None:
    model = _tied()
    weft.adapt(model, weft.TrainableTokens(tokens=(5, 12)), name="a")
    weft.adapt(model, weft.TrainableTokens(tokens=(7, 12)), name="b")
    weft.adapt(model, weft.LoRA(rank=2, targets=("embed_tokens", "lm_head")), name="c")
    for seed, name in enumerate("abc"):
        jolt(nn.ModuleList(attached(model, name).values()), 0.3, seed)
    embedding: Any = model.model.embed_tokens
    a, b = (attached(model, n)["model.embed_tokens"].E.detach() for n in "ab")
    ids, base = torch.tensor([5, 7, 12, 8]), embedding.weight.detach()
    weft.use(model, ["a", "b"])
    assert torch.equal(embedding(ids), torch.stack([a[0], b[0], b[1], base[8]])), "the later one's rows count"
    weft.use(model, ["b", "a"])
    assert torch.equal(embedding(ids), torch.stack([a[0], b[0], a[1], base[8]]))
    both = out(model)
    weft.merge(model)
    assert far(out(model), both) < 1e-5 and model.lm_head.weight is embedding.weight
    weft.unmerge(model)
    weft.use(model, ["c", "a"])
    assert torch.equal(embedding(ids[:1]), a[:1]), "what stands before counts for other rows"
    before = out(model)
    with pytest.raises(weft.WeftError, match="untie=True"):
        weft.merge(model)
    weft.merge(model, untie=True)
    assert far(out(model), before) < 1e-5


def test_a_file_whose_tied_rows_differ_is_refused(tmp_path: Path) -> None:
    weft.save(weft.adapt(_tied(), weft.TrainableTokens(tokens=(5, 12))), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    assert len(state) == 2
    state["base_model.model.lm_head.trainable_tokens_delta"] += 1
    save_file(state, file)
    with pytest.raises(weft.WeftError, match="other than those of the layer that this model ties theirs to"):
        weft.load(_tied(), tmp_path)


def test_a_base_in_four_bits_and_a_scaled_padded_embedding() -> None:
    packed = llama()
    quantise_(packed, "nf4", block=32)
    before = out(packed)
    weft.adapt(packed, weft.LoRA(rank=2, trainable_token_indices=(5, 12)))
    assert torch.allclose(out(packed), before, atol=1e-6)
    jolt(nn.ModuleList(attached(packed, "default").values()), 0.3)
    assert far(out(packed), before) > 1e-3
    out(packed).square().mean().backward()
    assert all(p.grad is not None for p in trainable(packed, "default").values())
    gemma: Any = _family("Gemma 3")
    weft.adapt(gemma, weft.TrainableTokens(tokens=(5, gemma.config.pad_token_id), targets="embed_tokens"))
    rows = attached(gemma, "default")["model.embed_tokens"]
    jolt(rows, 0.3)
    found = gemma.model.embed_tokens(torch.tensor([[gemma.config.pad_token_id, 5]]))
    assert torch.allclose(found[0], rows.E[[1, 0]] * gemma.config.hidden_size**0.5, rtol=1e-5)
    found.sum().backward()
    assert rows.E.grad[0].any() and not rows.E.grad[1].any(), "the row of the padding gets no gradient, as in the base's class"


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = weft.adapt(_tied(), weft.TrainableTokens(tokens=(5, 12)))
    (rows,) = trainable(model, "default").values()
    assert rows.is_meta and rows.shape == (2, 32) and model(IDS.to("meta")).logits.is_meta


WRONG: dict[str, tuple[weft.Method, str]] = {
    "outside": (weft.TrainableTokens(tokens=(5, 96, -1)), r"model.embed_tokens has no token 96, -1: its tokens are 0 to 95"),
    "text": (weft.TrainableTokens(tokens=("a",)), "has no token 'a'"), "none": (weft.TrainableTokens(), "no token is named for"),
    "twice": (weft.TrainableTokens(tokens=(5, 7, 5)), "token 5 is named twice"),
    "nowhere": (weft.TrainableTokens(tokens=(5,), targets="embeds"), "'embeds' matches no module"),
    "no rows": (weft.TrainableTokens(tokens=(5,), targets="norm"), "model.norm is a LlamaRMSNorm, which has no row for each token"),
    "two ways": (weft.LoRA(targets=("q_proj", "embed_tokens"), trainable_token_indices=(5,)),
                 "model.embed_tokens: adapted as a layer by targets and once more by .* its tokens"),
    "tied": (weft.LoRA(targets=("q_proj", "lm_head"), trainable_token_indices=(5,)), "lm_head: adapted as a layer by targets and once"),
    "whole": (weft.LoRA(modules_to_save="embed_tokens", trainable_token_indices=(5,)), "trained whole by modules_to_save and"),
    "not alike": (weft.LoRA(trainable_token_indices={"embed_tokens": (5,), "model.embed_tokens": (6,)}), "twice, for different tokens"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_told(what: str) -> None:
    method, told = WRONG[what]
    model = _tied()
    before = {p: type(m) for p, m in model.named_modules()}
    with pytest.raises(weft.WeftError, match=told):
        weft.adapt(model, method)
    assert {p: type(m) for p, m in model.named_modules()} == before


def test_a_model_that_does_not_say_its_embedding(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(10, 4), nn.Embedding(5, 4)

    with pytest.raises(weft.WeftError, match=r"name the embedding(.|\n)*Embeddings here: words, places"):
        weft.adapt(Two(), weft.TrainableTokens(tokens=(3,)))
    assert list(attached(weft.adapt(Two(), weft.TrainableTokens(tokens=(3,), targets="words")), "default")) == ["words"]
    one = weft.adapt(Plain(), weft.TrainableTokens(tokens=(3,)))
    assert list(attached(one, "default")) == ["embed"]
    weft.save(one, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["token_indices"] == [3]
