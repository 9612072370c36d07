"""The last layer's work at tokens that bear no loss is left out, and nobody can tell by the loss or a gradient."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import weft
from tests.step.test_loss import MODELS, build
from weft.adapters import trainable
from weft.data import Example, pack, pad
from weft.models import attention
from weft.step import elide, loss_sum, prepare
from weft.step.check import differences, measure
from weft.step.elide import only, tail
from weft.step.regions import repeated

METHODS = {
    "LoRA": weft.LoRA(rank=3), "DoRA": weft.DoRA(rank=3), "IA3": weft.IA3(), "bottleneck": weft.Bottleneck(reduction=8),
    "LoRA of the MLP's down alone": weft.LoRA(rank=2, targets=["down_proj"]),
}  # fmt: skip


def examples(masks, seed=0):
    chance = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 97, (len(mask),), generator=chance).int().numpy() for mask in masks]
    return [Example(i, torch.tensor(mask, dtype=torch.bool).numpy(), n) for n, (i, mask) in enumerate(zip(ids, masks, strict=True))]


MASKS = {
    "prompts": [[0] * 20 + [1] * 7, [0] * 9 + [1] * 3],
    "one token": [[0] * 30 + [1]],
    "here and there": [[0, 1, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]],
}


def adapted(name, settings, method, dtype=torch.float64):
    model = build(name, settings).to(dtype).requires_grad_(False)
    torch.manual_seed(1)
    weft.adapt(model, method)
    with torch.no_grad():
        for p in trainable(model, "default").values():
            p.add_(0.1 * torch.randn_like(p))
    return model.train()


def measured(model, loss):
    parameters = trainable(model, "default")
    with FlopCounterMode(display=False) as count:
        found = loss()
        found.backward()
    gradients = {n: p.grad for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found.detach(), gradients, count.get_total_flops()


def packed(model):
    assert attention.use(model)
    return pack(examples(MASKS["prompts"]))


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_tokens(name):
    model = adapted(*MODELS[name], METHODS["LoRA"], torch.float32 if name == "mixtral" else torch.float64)  # grouped products know no fp64
    rough = 1e5 if name == "mixtral" else 1
    for how in (pack, pad):
        for masks in MASKS.values():
            batch = how(examples(masks))
            if how is pack and not attention.use(model):
                continue
            found = tail(model, repeated(model), None, trainable(model, "default"))
            assert found
            want = measured(model, partial(loss_sum, model, batch))
            with only(found, batch):
                got = measured(model, partial(loss_sum, model, batch))
            assert torch.allclose(got[0], want[0], rtol=1e-9 * rough)
            for key, g in want[1].items():
                assert torch.allclose(got[1][key], g, rtol=1e-6 * rough, atol=1e-9 * rough), key
            assert got[2] < want[2]
            assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_the_step(method):
    model = adapted(*MODELS["llama"], METHODS[method], torch.float32)
    assert attention.use(model)
    batch = pack(examples(MASKS["prompts"]))
    want = measured(model, partial(loss_sum, model, batch))
    said = []
    fast = prepare(model, batch, trainable(model, "default"), compile=False, say=said.append)
    assert not said and "the last layer's MLP at tokens that bear loss" in fast.describe()
    got = measured(model, partial(fast.loss, batch))
    assert torch.allclose(got[0], want[0], rtol=1e-5)
    assert all(torch.allclose(got[1][key], g, rtol=1e-3, atol=1e-5) for key, g in want[1].items())
    fast.close()


def test_a_batch_without_masked_tokens_costs_nothing_and_lets_no_forward_be_replaced():
    model = adapted(*MODELS["llama"], METHODS["LoRA"])
    batch = replace(pad(examples([[1] * 12])), keep=torch.arange(12))
    with only(tail(model, repeated(model), None, trainable(model, "default")), batch):
        assert not any("forward" in vars(m) for m in model.modules())


def test_who_is_left_alone():
    def found(change):
        model = adapted(*MODELS["llama"], METHODS["LoRA"])
        change(model)
        return tail(model, repeated(model), None, trainable(model, "default"))

    last = lambda model: repeated(model)[-1]  # noqa: E731
    assert len(found(lambda model: None)) == 2
    assert len(found(lambda model: last(model).mlp.register_forward_hook(lambda *_: None))) == 1  # somebody wants all of it
    assert len(found(lambda model: last(model).mlp.gate_proj.register_forward_hook(lambda *_: None))) == 1  # or of what is in it
    assert not found(lambda model: setattr(model.model, "gradient_checkpointing", True))

    def looks_around(model):
        norm = last(model).post_attention_layernorm
        own = norm.forward
        norm.forward = lambda x: own(x) + 1e-3 * x.mean(1, keepdim=True)

    assert not found(looks_around)
    assert not found(lambda model: model.add_module("extra", nn.ModuleList([deepcopy(last(model))])))  # a last layer that is never run


def test_what_looks_at_other_tokens_is_seen_though_it_starts_by_adding_nothing():
    model = adapted(*MODELS["llama"], METHODS["LoRA"], torch.float32)
    mlp = repeated(model)[-1].mlp

    class LooksAround(type(mlp)):
        def forward(self, x):
            return super().forward(x) + self.share * x.mean(1, keepdim=True)

    mlp.__class__, mlp.share = LooksAround, nn.Parameter(torch.zeros(()))
    parameters = {**trainable(model, "default"), "share": mlp.share}
    fast = prepare(model, packed(model), parameters, compile=False, self_check=False)  # only the trial stands in its way
    assert not fast.tail and not mlp.share.any()
    fast.close()


def test_around_the_mlp_and_in_it_at_once():
    model = build(*MODELS["llama"]).requires_grad_(False)
    weft.adapt(model, weft.Bottleneck(reduction=8, targets=["mlp"]), name="around")
    weft.adapt(model, METHODS["DoRA"], name="in")
    weft.use(model, ["around", "in"])
    parameters = {f"{name} {key}": p.requires_grad_() for name in ("around", "in") for key, p in trainable(model, name).items()}
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn_like(p))
    batch = packed(model)
    fast = prepare(model.train(), batch, parameters, compile=False)
    assert len(fast.tail) == 2
    found, want = (measure(model, [batch], loss, parameters) for loss in (fast.loss, partial(loss_sum, model)))
    assert not differences(found, want, (1e-6, 1e-5, 1e-4))[1] and len(want[1]) == len(parameters)
    fast.close()


def test_gradients_of_several_batches_add_up_and_evaluation_is_left_alone():
    model = adapted(*MODELS["qwen3"], METHODS["LoRA"], torch.float32)
    first = packed(model)
    batches = [first, pack(examples(MASKS["here and there"], 1)), pack(examples(MASKS["one token"], 2)), pack(examples([[0] * 9], 3))]
    fast = prepare(model, first, trainable(model, "default"), compile=False)
    with torch.no_grad():
        before = model(first.input_ids).logits

    def summed(loss):
        for batch in batches:
            loss(batch).backward()
        grads = {n: p.grad.clone() for n, p in trainable(model, "default").items()}
        model.zero_grad()
        return 0.0, grads

    got, want = summed(fast.loss), summed(partial(loss_sum, model))
    assert fast.tail and not differences(got, want, (1e-6, 1e-5, 1e-4))[1] and any(g.any() for g in want[1].values())
    with torch.no_grad():
        assert torch.equal(model(first.input_ids).logits, before)  # every token's
    fast.close()


def test_whoever_hooks_a_module_later_sees_all_tokens():
    model = adapted(*MODELS["llama"], METHODS["LoRA"], torch.float32)
    batch, seen = packed(model), []
    fast = prepare(model, batch, trainable(model, "default"), compile=False)
    assert len(fast.tail) == 2
    repeated(model)[-1].mlp.down_proj.register_forward_hook(lambda m, given, made: seen.append(made.shape[1]))
    fast.loss(batch)
    assert seen == [batch.input_ids.shape[1]]
    fast.close()


def test_a_step_that_disagrees_loses_this_alone(monkeypatch):
    own = elide._only
    monkeypatch.setattr(elide, "_only", lambda found, keep, length, others: own(found, keep if others else keep[1:], length, others))
    model = adapted(*MODELS["llama"], METHODS["LoRA"], torch.float32)
    batch, said = packed(model), []
    fast = prepare(model, batch, trainable(model, "default"), compile=False, say=said.append)
    assert len(said) == 1 and said[0].startswith("the last layer computes all tokens: ") and "does not agree" in said[0]
    assert not fast.tail and fast.head is not None and fast.said and "the last layer" not in fast.describe()
    fast.close()


def test_what_the_self_check_would_not_see_is_not_used():
    model = adapted(*MODELS["llama"], METHODS["LoRA"], torch.float32)
    batch = replace(packed(model), owners=("default",) * 2)
    assert not elide.masked(batch) and not elide.masked(replace(batch, owners=(), keep=None))
    batch = replace(pad(examples([[1] * 12])), keep=torch.arange(12))
    assert not prepare(model, batch, trainable(model, "default"), compile=False).tail


def test_layers_that_are_computed_again_are_computed_whole():
    model = adapted(*MODELS["llama"], METHODS["LoRA"], torch.float32)
    batch = pad(examples(MASKS["prompts"]))
    said = []
    fast = prepare(model, batch, trainable(model, "default"), compile=False, memory=0.0, say=said.append)
    assert not fast.tail and not said
    fast.close()
