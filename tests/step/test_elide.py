"""The last layer's work at tokens that bear no loss is left out, and nobody can tell by the loss or a gradient."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import weft
from tests.step.test_loss import MODELS, build
from weft.adapters import trainable
from weft.data import Example, pack, pad
from weft.models import attention
from weft.step import loss_sum, prepare
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


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_tokens(name):
    model = adapted(*MODELS[name], METHODS["LoRA"], torch.float32 if name == "mixtral" else torch.float64)  # grouped products know no fp64
    rough = 1e5 if name == "mixtral" else 1
    for how in (pack, pad):
        for masks in MASKS.values():
            batch = how(examples(masks))
            if how is pack and not attention.use(model):
                continue
            found = tail(model, repeated(model), None)
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
    with only(tail(model, repeated(model), None), batch):
        assert not any("forward" in vars(m) for m in model.modules())


def test_who_is_left_alone():
    def found(change):
        model = adapted(*MODELS["llama"], METHODS["LoRA"])
        change(model)
        return tail(model, repeated(model), None)

    last = lambda model: repeated(model)[-1]  # noqa: E731
    assert len(found(lambda model: None)) == 2
    assert len(found(lambda model: last(model).mlp.register_forward_hook(lambda *_: None))) == 1  # somebody wants all of it
    assert not found(lambda model: setattr(model.model, "gradient_checkpointing", True))

    def looks_around(model):
        norm = last(model).post_attention_layernorm
        own = norm.forward
        norm.forward = lambda x: own(x) + 1e-3 * x.mean(1, keepdim=True)

    assert not found(looks_around)


def test_layers_that_are_computed_again_are_computed_whole():
    model = adapted(*MODELS["llama"], METHODS["LoRA"], torch.float32)
    batch = pad(examples(MASKS["prompts"]))
    fast = prepare(model, batch, trainable(model, "default"), compile=False, memory=0.0)
    assert not fast.tail
    fast.close()
