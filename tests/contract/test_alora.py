"""An activated LoRA: before its invocation the base bit for bit, and from there on one computation, however the tokens are handed in."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.conftest import Plain, gpt2, jolt, llama
from tests.contract.test_prompts import GREEDY, _checkpoint, bart, gemma2, mamba
from weft.adapters import attached, trainable
from weft.data.batches import pack, pad
from weft.data.encode import Example
from weft.models import attention
from weft.step import loss_sum
from weft.step.fast import prepare

CALL = (5, 6)
T = 9
# row: the place from which it is adapted, T for never. The second is padded on the left, the third has it twice, and half of it.
STARTS = (4, 6, 5, T)


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    ids, mask = torch.randint(10, 90, (4, T)), torch.ones(4, T, dtype=torch.long)
    for row, at in ((0, 4), (1, 6), (2, 2), (2, 5)):
        ids[row, at : at + 2] = torch.tensor(CALL)
    ids[2, 0], ids[3, 3] = CALL
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def adapted(model: Any, name: str = "default", tokens: tuple[int, ...] = CALL, **more: Any) -> Any:
    weft.adapt(model, weft.ALoRA(**dict(rank=4, alpha=8, invocation_tokens=tokens) | more), name)
    jolt(nn.ModuleList(attached(model, name).values()), size=0.2, seed=len(name))
    return model


@pytest.mark.parametrize("make", [llama, gpt2, gemma2])
def test_before_the_invocation_it_is_the_base_bit_for_bit(make: Any) -> None:
    model, (ids, mask) = adapted(make(), lora_bias=True), rows()
    with torch.no_grad():
        mine = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        with weft.using(model, None):
            base = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for row, start in enumerate(STARTS):
        own = slice(int((mask[row] == 0).sum()), start)  # padding may see anything
        assert all(torch.equal(a[row, own], b[row, own]) for a, b in zip(mine, base, strict=True))
        assert start == T or not torch.isclose(mine[-1][row, start:], base[-1][row, start:], atol=1e-4).all(-1).any()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [llama, gpt2, gemma2, mamba])
def test_generation_equals_a_loop_without_cache(make: Any, beams: int) -> None:
    model, (ids, mask) = adapted(make()), rows()
    if make is mamba:
        ids, mask = ids[[0, 2, 3]], mask[[0, 2, 3]]
    how = dict(attention_mask=mask, num_beams=beams, **GREEDY)
    with torch.no_grad():
        made, again = (model.generate(ids, use_cache=cache, **how) for cache in (True, False))
        with weft.using(model, None):
            base = model.generate(ids, **how)
    assert torch.equal(made, again) and torch.equal(made[-1], base[-1]) and not torch.equal(made, base)


@pytest.mark.filterwarnings("ignore:Passing `generation_config`")
def test_other_ways_of_writing_write_the_same() -> None:
    model, (ids, mask) = adapted(llama()), rows()
    with torch.no_grad():
        want = model.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY), want)
        assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=2, **GREEDY), want[:1])
        assert torch.equal(model.generate(ids[:1], assistant_model=llama(seed=1), **GREEDY), want[:1])


def test_what_the_model_writes_is_no_invocation() -> None:
    """The prompt decides, whether the invocation has one token or several."""
    model, (ids, _) = adapted(llama(), tokens=CALL[:1]), rows()
    prompt = ids[3:, 4:]
    with torch.no_grad():
        with weft.using(model, None):
            base = model.generate(prompt, **GREEDY)
        cache = model(prompt, use_cache=True).past_key_values
        written = torch.tensor([CALL[:1]])
        with_it = model(written, past_key_values=copy.deepcopy(cache)).logits
        with weft.using(model, None):
            assert torch.equal(model(written, past_key_values=cache).logits, with_it)
        assert torch.equal(model.generate(prompt, **GREEDY), base)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_base_s_cache_goes_on_being_used(make: Any) -> None:
    model, (ids, _) = adapted(make()), rows()
    ids = ids[:1]
    with torch.no_grad():
        whole = model(ids).logits
        with weft.using(model, None):
            begun = model(ids[:, :4], use_cache=True).past_key_values
        for _ in range(2):  # a copy for each use
            cache = copy.deepcopy(begun)
            parts = [model(part, past_key_values=cache).logits for part in (ids[:, 4:7], ids[:, 7:8], ids[:, 8:])]
            assert torch.allclose(torch.cat(parts, 1), whole[:, 4:], atol=1e-5)
        copied = copy.deepcopy(cache)
        assert torch.allclose(model(ids[:, :2], past_key_values=copied).logits, model(ids[:, :2], past_key_values=cache).logits, atol=1e-6)
        want, got = model.generate(ids, **GREEDY), model.generate(ids, past_key_values=copy.deepcopy(begun), **GREEDY)
        assert torch.equal(got, want)
        cache.crop(-(cache.get_seq_length() - 4))  # back to what the base has filled: nothing is left of the invocation
        after = model(ids[:, :2], past_key_values=cache).logits
        with weft.using(model, None):
            assert torch.equal(model(ids[:, :2], past_key_values=begun).logits, after)


def test_rows_with_different_ones_none_and_other_methods() -> None:
    model = adapted(adapted(llama(), "one"), "other", CALL[:1], lora_bias=True, targets="mlp.*")
    weft.adapt(model, weft.LoRA(rank=2, targets="q_proj"), "lora")
    jolt(nn.ModuleList(attached(model, "lora").values()))
    weft.adapt(model, weft.PrefixTuning(tokens=3), "prefix")
    names = ["one", None, "other", "lora", "prefix", "one"]
    ids, mask = (t[[0, 0, 1, 2, 2, 2]] for t in rows())
    with torch.no_grad():
        with weft.rows(model, names):
            mixed = model(ids, attention_mask=mask).logits
            made = {n: model.generate(ids, attention_mask=mask, num_beams=n, **GREEDY) for n in (1, 3)}
        for i, name in enumerate(names):
            own, at = dict(attention_mask=mask[i : i + 1]), int((mask[i] == 0).sum())
            with weft.using(model, name):
                assert torch.allclose(mixed[i, at:], model(ids[i : i + 1], **own).logits[0, at:], atol=1e-5), name
                assert all(torch.equal(made[n][i], model.generate(ids[i : i + 1], num_beams=n, **own, **GREEDY)[0]) for n in made), name


@pytest.mark.parametrize("order", ["aabb", "abab", "aba-", "-ab-"])
def test_mixed_rows_train_as_they_would_alone(order: str) -> None:
    model = adapted(adapted(llama(), "a"), "b", CALL[:1])
    ids, _ = rows()
    names = [None if c == "-" else c for c in order]

    def gradients() -> list[Tensor]:
        found = [p.grad.clone() for n in "ab" for p in trainable(model, n).values() if p.grad is not None]
        model.zero_grad()
        return found

    for i, name in enumerate(names):
        if name is not None:
            weft.use(model, name)
            model(ids[i : i + 1]).logits.square().sum().backward()
    want = gradients()
    with weft.rows(model, names):
        model(ids).logits.square().sum().backward()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(gradients(), want, strict=True))


def test_two_at_work_begin_each_at_its_own() -> None:
    model, (ids, _) = adapted(adapted(llama(), "a"), "b", (int(rows()[0][0, 1]),)), rows()
    weft.use(model, ["a", "b"])
    with torch.no_grad():
        both = model(ids, output_hidden_states=True).hidden_states
        with weft.using(model, "b"):
            late = model(ids, output_hidden_states=True).hidden_states
    for a, b in zip(both, late, strict=True):
        assert torch.equal(a[0, :4], b[0, :4])
    assert not torch.allclose(both[-1][0, 4:], late[-1][0, 4:], atol=1e-4)


def test_only_tokens_from_the_invocation_on_have_a_gradient() -> None:
    model, (ids, mask) = adapted(llama().train()), rows()
    before = torch.arange(T)[None] < torch.tensor(STARTS)[:, None]
    for place, expected in ((before, False), (~before, True)):
        model.zero_grad()
        model(ids, attention_mask=mask).logits[place].square().sum().backward()
        assert all(bool(p.grad.any()) == expected for p in trainable(model, "default").values() if p.grad is not None)


def examples() -> list[Example]:
    ids, mask = rows()
    kept = [row[there.bool()].numpy().astype(np.int32) for row, there in zip(ids, mask, strict=True)]
    return [Example(row, np.arange(len(row)) > 1) for row in [*kept, np.array(CALL[1:] * 2, np.int32)]]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_padded_and_alone_are_one_loss_and_one_gradient(checkpointed: bool) -> None:
    model, found = adapted(llama().train()), examples()
    assert attention.use(model)

    def step(*batches: Any) -> list[Tensor]:
        model.zero_grad()
        loss: Any = sum(loss_sum(model, batch) for batch in batches)
        loss.backward()  # of several calls: what is computed again belongs to its own
        return [loss.detach(), *(p.grad.clone() for p in trainable(model, "default").values())]

    want = step(*(pad([row]) for row in found))
    if checkpointed:
        model.gradient_checkpointing = True
        for layer in model.model.layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, _checkpoint
    for batches in ([pad(found)], [pack(found)], [pad(found[:2]), pack(found[2:])], [pad([row]) for row in found]):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(step(*batches), want, strict=True))


def test_rows_packed_by_their_positions_alone() -> None:
    model, found = adapted(llama()), examples()
    batch = pack(found)
    gate = attached(model, "default")[""].gate
    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(gate.off[0, :, 0]))
    model(batch.input_ids, position_ids=batch.position_ids)
    starts = [4, 3, 5, T, 2]
    assert torch.equal(seen[0], torch.cat([torch.arange(len(row)) < start for row, start in zip(found, starts, strict=True)]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")  # what torch's compiler itself causes
@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_the_fast_step_is_checked_and_taken(memory: float) -> None:
    model, found, said = adapted(llama().train()), examples(), []
    assert attention.use(model)
    torch._dynamo.reset()
    fast = prepare(model, pack(found), trainable(model, "default"), memory=memory, compile=True, say=said.append)
    try:
        assert fast.compiled and not said, said
        for batch in (pack(found), pack(found[::-1]), pack(found[:2])):
            got, want = [], []
            for loss, into in ((fast.loss, got), (lambda b: loss_sum(model, b), want)):
                model.zero_grad()
                loss(batch).backward()
                into.extend(p.grad.clone() for p in trainable(model, "default").values())
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, want, strict=True))
    finally:
        fast.close()
        torch._dynamo.reset()


def test_a_training_that_meets_no_invocation_is_told() -> None:
    model, (ids, _) = adapted(llama().train()), rows()
    with pytest.warns(UserWarning, match="learns nothing from it"):
        model(ids[3:])
    model(ids[3:])  # once
    adapted(model, "b").train()
    with weft.rows(model, ["b", "default"]), pytest.warns(UserWarning, match="learns nothing from it"):
        model(ids[[3, 0]])  # it is its own rows that count
    adapted(model, "c").train()
    with weft.rows(model, ["default", "default"]):
        model(ids[:2])


def test_mistakes_are_told() -> None:
    for wrong, said in (
        (dict(invocation_tokens=()), "ids of one token or more"), (dict(bias="all"), "would act before the invocation"),
        (dict(init="pissa"), 'init="pissa"'), (dict(rank=0), "a rank of 0"),
    ):  # fmt: skip
        with pytest.raises(weft.WeftError, match=said):
            weft.ALoRA(**dict(invocation_tokens=CALL) | wrong)
    for other in (bart(), Plain()):
        with pytest.raises(weft.WeftError, match="input_ids of a decoder"):
            weft.adapt(other, weft.ALoRA(invocation_tokens=CALL))
    with pytest.raises(weft.WeftError, match="ALoRA can adapt linear layers"):
        weft.adapt(llama(), weft.ALoRA(invocation_tokens=CALL, targets="embed_tokens"))
    with pytest.raises(weft.WeftError, match="ALoRA is not for parameters"):
        weft.adapt(llama(), weft.ALoRA(invocation_tokens=CALL, target_parameters="q_proj.weight"))
    model, (ids, _) = adapted(llama()), rows()
    with pytest.raises(weft.WeftError, match="in place of inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(weft.WeftError, match="called without its model"):
        model.model(ids)
    for act in (weft.merge, weft.convert):
        with pytest.raises(weft.WeftError, match="no change of weights"):
            act(model, "default")
    with pytest.raises(weft.WeftError, match="no low-rank update"):
        weft.combine(model, {"default": 1.0}, name="two", how="linear")
    with pytest.raises(weft.WeftError, match="every token in its place"):
        adapted(llama(), targets="lm_head")(ids, logits_to_keep=1)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(weft.WeftError, match="must be the same rows"):
        model(ids[:3, :1], past_key_values=cache)
