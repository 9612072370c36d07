"""What stands in front of a model's input: nothing that it computes may depend on padding, packing, the cache, or its neighbours."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import weft
from tests.conftest import gpt2, jolt, llama
from weft.adapters import attached, trainable
from weft.core import Method
from weft.data.batches import pack, pad
from weft.data.encode import Example
from weft.models import attention
from weft.step import loss_sum

METHODS: dict[str, Method] = {
    "prefix": weft.PrefixTuning(tokens=3), "prefix-projected": weft.PrefixTuning(tokens=5, projection=True, hidden=8),
    "prompt": weft.PromptTuning(tokens=4), "p-tuning": weft.PTuning(tokens=2, hidden=8, encoder="lstm"),
}  # fmt: skip
GREEDY: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


def gemma2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        sliding_window=6, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    torch.manual_seed(1)
    return METHODS[request.param]


def tokens(*shape: int) -> Tensor:
    torch.manual_seed(3)
    return torch.randint(3, 90, shape)


def ragged() -> tuple[Tensor, Tensor]:
    """Two rows flush right: 6 and 9 tokens."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    return ids, mask


@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_changes_nothing_on_either_side(make: Any, method: Method) -> None:
    model = weft.adapt(make(), method)
    ids, none = tokens(2, 7), torch.zeros(2, 2, dtype=torch.long)
    ones = torch.ones_like(ids)
    with torch.no_grad():
        want = model(ids).logits
        right = model(torch.cat([ids, none], 1), attention_mask=torch.cat([ones, none], 1)).logits[:, :7]
        left = model(torch.cat([none, ids], 1), attention_mask=torch.cat([none, ones], 1)).logits[:, 2:]
    assert want.shape == (2, 7, 96), "the answer is as long as the question"
    assert torch.allclose(right, want, atol=1e-5) and torch.allclose(left, want, atol=1e-5)


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()


def test_a_state_space_model_takes_a_prompt_and_says_why_no_prefix() -> None:
    model = weft.adapt(mamba(), weft.PromptTuning(tokens=3))
    ids = again = tokens(2, 7)
    with torch.no_grad():
        made = model.generate(ids, **GREEDY)
        for _ in range(6):
            again = torch.cat([again, model(again, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, again)
    with pytest.raises(weft.WeftError, match="no attention layer with a cache; PromptTuning needs none"):
        weft.adapt(mamba(), weft.PrefixTuning())


@pytest.mark.parametrize("make", [llama, gpt2, gemma2])
def test_generation_equals_a_loop_without_cache(make: Any, method: Method) -> None:
    model = weft.adapt(make(), method)
    ids, mask = ragged()
    with torch.no_grad():
        made = model.generate(ids, attention_mask=mask, **GREEDY)
        for _ in range(6):
            step = model(ids, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
        assert torch.equal(made, ids)
        ids, mask = ragged()
        beams = [model.generate(ids, attention_mask=mask, num_beams=3, use_cache=c, **GREEDY) for c in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoders_generate_and_mix(make: Any) -> None:
    model = make()
    for name, method in METHODS.items():
        same = {"prefix-projected": weft.PrefixTuning(tokens=3, projection=True), "p-tuning": weft.PTuning(tokens=4)}
        weft.adapt(model, same.get(name, method), name)
    rows = ["prompt", None, "prefix", "p-tuning", "prefix-projected"] if make is t5 else ["prompt", "p-tuning"]
    ids, mask = tokens(len(rows), 8), torch.ones(len(rows), 8, dtype=torch.long)
    mask[0, 6:] = 0
    with torch.no_grad():
        for beams in (1, 3):
            if make is t5:
                with weft.rows(model, rows):
                    mixed = model.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY)
            for i, name in enumerate(rows):
                with weft.using(model, name):
                    own = dict(attention_mask=mask[i : i + 1], num_beams=beams, **GREEDY)
                    alone = [model.generate(ids[i : i + 1], use_cache=c, **own) for c in (True, False)]
                assert torch.equal(*alone), name
                assert make is not t5 or torch.equal(mixed[i], alone[0][0]), name


def test_rows_with_different_ones_none_and_other_methods() -> None:
    model = llama()
    for name, method in METHODS.items():
        weft.adapt(model, method, name)
    weft.adapt(model, weft.LoRA(rank=2, targets="q_proj"), "lora")
    jolt(nn.ModuleList(attached(model, "lora").values()))
    rows = ["prompt", None, "prefix-projected", "prefix", "lora", "p-tuning"]
    ids, mask = tokens(6, 8), torch.ones(6, 8, dtype=torch.long)
    mask[0, :3] = mask[3, :2] = mask[1, :4] = 0
    with torch.no_grad():
        with weft.rows(model, rows):
            mixed, unpadded = model(ids, attention_mask=mask).logits, model(ids).logits
            made = {n: model.generate(ids, attention_mask=mask, num_beams=n, **GREEDY) for n in (1, 3)}
        for i, name in enumerate(rows):
            own, at = dict(attention_mask=mask[i : i + 1]), int((mask[i] == 0).sum())
            with weft.using(model, name):
                assert torch.allclose(mixed[i, at:], model(ids[i : i + 1], **own).logits[0, at:], atol=1e-5), name
                assert torch.allclose(unpadded[i], model(ids[i : i + 1]).logits[0], atol=1e-5), name
                assert all(torch.equal(made[n][i], model.generate(ids[i : i + 1], num_beams=n, **own, **GREEDY)[0]) for n in made), name
    with weft.rows(model, rows):
        model(ids).logits.square().mean().backward()
    assert all(p.grad is not None for n in METHODS for p in trainable(model, n).values())


def test_the_order_of_rows_does_not_matter() -> None:
    model, ids = llama(), tokens(2, 6)
    for name in ("prefix", "prompt"):
        weft.adapt(model, METHODS[name], name)
    with torch.no_grad():
        with weft.rows(model, ["prompt", "prefix"]):
            want = model(ids).logits
        with weft.rows(model, ["prefix", "prompt"]):
            assert torch.allclose(model(ids.flip(0)).logits.flip(0), want, atol=1e-6)


def test_several_active_ones_stand_behind_each_other() -> None:
    model = llama()
    ids, mask = ragged()
    for name, method in METHODS.items():
        weft.adapt(model, method, name)
    for names in (["prefix", "prefix-projected"], ["prompt", "p-tuning"], ["prefix", "prompt"], ["prompt", "prefix", "p-tuning"]):
        weft.use(model, names)
        with torch.no_grad():
            made = model.generate(ids, attention_mask=mask, **GREEDY)
            again, here = ids, mask
            for _ in range(6):
                step = model(again, attention_mask=here, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                again, here = torch.cat([again, step], 1), torch.cat([here, torch.ones_like(step)], 1)
        assert torch.equal(made, again), names


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_a_prefix_and_a_prompt_work_together_in_any_order(make: Any) -> None:
    torch.manual_seed(1)
    model = make()
    for name in ("prefix", "prompt"):
        weft.adapt(model, METHODS[name], name)
    weft.adapt(model, weft.LoRA(rank=2), "lora")
    jolt(nn.ModuleList(attached(model, "lora").values()))
    ids, mask = ragged()
    more = dict(decoder_input_ids=tokens(2, 4)) if make is t5 else {}
    there = slice(None) if make is t5 else mask.bool()
    found: list[tuple[Tensor, ...]] = []
    for names in itertools.permutations(("prefix", "prompt", "lora")):
        weft.use(model, names)
        with torch.no_grad():
            made = [model.generate(ids, attention_mask=mask, num_beams=n, use_cache=c, **GREEDY) for n in (1, 3) for c in (True, False)]
            found.append((model(ids, attention_mask=mask, **more).logits[there], *made))
        assert torch.equal(made[0], made[1]) and torch.equal(made[2], made[3]), names
    for other in found[1:]:
        assert torch.allclose(other[0], found[0][0], atol=1e-5) and torch.equal(other[1], found[0][1])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_padded_and_alone_are_one_loss_and_one_gradient(method: Method, checkpointed: bool) -> None:
    model = llama()
    assert attention.use(model)
    weft.adapt(model.train(), method)
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(3, 90, n).astype(np.int32), np.arange(n) > 1) for n in (5, 9, 3)]

    def step(*batches: Any) -> list[Tensor]:
        model.zero_grad()
        loss: Any = sum(loss_sum(model, batch) for batch in batches)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in trainable(model, "default").values() if p.grad is not None)]

    want = step(*(pad([row]) for row in rows))
    assert len(want) == 1 + len(trainable(model, "default"))
    if checkpointed:
        model.gradient_checkpointing = True
        for layer in model.model.layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, _checkpoint
    for batch in (pad(rows), pack(rows)):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(step(batch), want, strict=True))


def _checkpoint(function: Any, *inputs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)


def test_a_window_forgets_the_prefix_in_packed_rows_as_in_padded_ones() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=6,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    assert attention.use(model)
    weft.adapt(model, weft.PrefixTuning(tokens=3))
    rows = [Example(tokens(n).numpy().astype(np.int32), np.ones(n, dtype=bool)) for n in (12, 4)]
    assert torch.allclose(loss_sum(model, pack(rows)), loss_sum(model, pad(rows)), atol=1e-4)


def test_a_prompt_of_words_is_the_words_themselves(tmp_path: Path) -> None:
    model, tokenizer = weft.load_base("embedded", device="cpu"), weft.load_tokenizer("embedded")
    text = "The river was wide"
    words = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = tokenizer(" and slow, and", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = model(torch.cat([words, ids], 1)).logits[:, words.shape[1] :]
        weft.adapt(model, weft.PromptTuning(tokens=words.shape[1], init="text", text=text))
        assert torch.allclose(model(ids).logits, want, atol=1e-4)
        weft.remove(model)
        weft.adapt(model, weft.PrefixTuning(tokens=words.shape[1], init="text", text=text), "prefix")
        assert torch.allclose(model(ids).logits, want, atol=1e-4)
    vectors = model.get_input_embeddings().weight
    drawn = trainable(weft.adapt(model, weft.PromptTuning(tokens=5), "drawn"), "drawn")[".P"]
    assert all((vectors == row).all(1).any() for row in drawn.detach())


def test_labels_get_the_loss_of_the_own_tokens() -> None:
    model = weft.adapt(llama(), weft.PromptTuning(tokens=3))
    ids = tokens(2, 7)
    labels = ids.clone()
    labels[:, :2] = -100
    out = model(ids, labels=labels)
    want = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(out.loss, want, atol=1e-6)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert all(h.shape[1] == 7 for h in hidden)


def test_mistakes_are_told() -> None:
    model = llama()
    ids = tokens(1, 4)
    cache = model(ids, use_cache=True).past_key_values
    weft.adapt(model, weft.PromptTuning(tokens=3), "p")
    with pytest.raises(weft.WeftError, match="begun without the prompt"):
        model(ids, past_key_values=cache)
    with pytest.raises(weft.WeftError, match="init='text' needs text"):
        weft.adapt(model, weft.PromptTuning(init="text"), "q")
    with pytest.raises(weft.WeftError, match="needs the bare base"):
        weft.adapt(model, weft.PrefixTuning(init="vocab"), "q")
    with pytest.raises(weft.WeftError, match="no projection, which begins by lot"):
        weft.adapt(model, weft.PrefixTuning(init="vocab", projection=True), "q")
    with pytest.raises(weft.WeftError, match="must be 1 or more"):
        weft.adapt(model, weft.PrefixTuning(tokens=0), "q")
    with pytest.raises(weft.WeftError, match="two dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    other = bart()
    weft.adapt(other, weft.PrefixTuning(tokens=2), "two")
    weft.adapt(other, weft.PrefixTuning(tokens=3), "three")
    both = dict(input_ids=tokens(2, 5), decoder_input_ids=tokens(2, 4))
    with pytest.raises(weft.WeftError, match="different length"), weft.rows(other, ["two", "three"]):
        other(**both)


def test_generate_sees_what_a_model_takes() -> None:
    model = weft.adapt(llama(), weft.PrefixTuning(tokens=2))
    assert model._supports_logits_to_keep()
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(tokens(1, 4), nonsense=1, **GREEDY)
