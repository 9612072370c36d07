"""Layers below the lowest one that is trained have no backward pass; gradients that were there before a step is chosen are dropped."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.step.test_loss import build, rows
from tests.step.test_stacked import quiet
from weft.data import pad
from weft.step import loss_sum, prepare
from weft.step.check import BOUNDS, differences, measure
from weft.step.regions import lowest, repeated, trains


def nodes(loss):
    """The names of what the backward pass will go through."""
    found, stack = {}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = type(node).__name__
            stack += [before for before, _ in node.next_functions]
    return list(found.values())


def model_with(method, layers=4):
    torch.manual_seed(0)
    model = build("Llama", dict(num_hidden_layers=layers)).requires_grad_(False)
    weft.adapt(model, method).train()
    parameters = weft.adapters.trainable(model, "default")
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.05 * torch.randn_like(p))
    return model, parameters


@quiet
@pytest.mark.parametrize("memory", [1.0, 0.1])
def test_layers_below_are_left_out(memory):
    model, parameters = model_with(weft.LoRA(rank=2, targets=["layers.2.self_attn.q_proj", "layers.3.mlp.down_proj"]))
    batch, said = pad(rows([9, 4, 7])), []
    want = measure(model, [batch], lambda b: loss_sum(model, b), parameters)
    fast = prepare(model, batch, parameters, compile=True, memory=memory, say=said.append)
    assert not said and fast.compiled
    loss = fast.loss(batch)
    assert nodes(loss).count("CompiledFunctionBackward") == 2
    del loss
    assert not (wrong := differences(measure(model, [batch], fast.loss, parameters), want, BOUNDS["fp32"])[1]), wrong
    fast.close()


@pytest.mark.parametrize("method", [weft.LoRA(rank=2), weft.Subspace(dimension=8), weft.VeRA(rank=4), weft.BitFit(add=True)])
def test_which_layer_is_the_lowest(method):
    """Also where what is trained lies outside of the layers."""
    model, _ = model_with(method)
    layers = repeated(model)
    assert all(map(trains, layers)) and lowest(layers) is layers[0]
    weft.remove(model)
    model.requires_grad_(False)
    assert not any(map(trains, layers)) and lowest(layers) is layers[0]
    layers[2].mlp.up_proj.weight.requires_grad_()
    assert lowest(layers) is layers[2]


def test_gradients_that_are_there_already_are_dropped():
    model, parameters = model_with(weft.LoRA(rank=2))
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    said = []
    fast = prepare(model, pad(rows([9, 4, 7])), parameters, compile=False, say=said.append)
    assert not said and "self-check" in fast.said[0]
    assert all(not p.grad.any() for p in parameters.values())
    fast.close()
