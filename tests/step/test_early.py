"""Kernels that are launched ahead of their first use: one gated MLP of each kind and the loss, and nothing is left of it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from tests.step.test_loss import rows
from weft.data import pad
from weft.kernels import gated as operations
from weft.kernels import linear_cross_entropy
from weft.quant import quantise_
from weft.step import early
from weft.step.fast import Fast
from weft.step.gated import gated_mlps
from weft.step.loss import fusible
from weft.step.trial import run


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("method", [weft.LoRA, weft.DoRA])
def test_each_kernel_is_launched_once_and_leaves_nothing(monkeypatch, base, method):
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).requires_grad_(False)
    if base != "fp32":
        quantise_(model, base)
    weft.adapt(model, method(rank=4))
    model.train()
    seen: list[tuple[str, int]] = []
    parts = [(operations, "gated_reference"), (operations, "gated_backward_reference"), (linear_cross_entropy, "_slice_in_place")]
    for module, name in parts:
        work = getattr(module, name)
        monkeypatch.setattr(module, name, lambda t, *rest, name=name, work=work: seen.append((name, len(t))) or work(t, *rest))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    early.launch(gated_mlps(model), fusible(model), torch.zeros(3, 7, dtype=torch.int64)).join()
    assert seen == [("gated_reference", 17), ("gated_backward_reference", 17), ("_slice_in_place", 17)]
    assert all(p.grad is None and torch.equal(before[name], p) for name, p in model.named_parameters())
    seen.clear()
    early.launch({}, fusible(model), torch.zeros(4, 8, dtype=torch.int64)).join()
    assert seen == [("_slice_in_place", 16)]


def test_it_begins_when_the_parameters_have_the_numbers_of_the_check(monkeypatch):
    """What writes to them between its forward and its backward pass would end it."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=4)).train()
    parameters, seen = weft.adapters.trainable(model, "default"), []
    monkeypatch.setattr("torch.compile", lambda f, **how: f)
    monkeypatch.setattr(early, "launch", lambda *_: seen.append(all(bool(p.any()) for p in parameters.values())))
    assert not all(bool(p.any()) for p in parameters.values())
    fast = Fast(model, True, fusible(model), False, 1.0, list(model.model.layers), True)
    run(fast, pad(rows([9, 4])), parameters, True, False, pytest.fail)
    fast.close()
    assert seen == [True]
