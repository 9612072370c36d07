"""A layer in no stack and its adapter as one operation: the same output and gradients, whatever happens to it meanwhile."""

from __future__ import annotations

import importlib

import pytest
import torch

import weft
from tests.step.test_loss import rows
from tests.step.test_stacked import model_of, quiet
from weft.data import pad
from weft.kernels.low_rank_linear import low_rank_linear, low_rank_linear_reference
from weft.step import alone, loss_sum, prepare


@pytest.mark.parametrize(("shape", "out", "rank"), [((5,), 7, 1), ((2, 3), 19, 8), ((1, 1), 1, 5), ((0,), 7, 2)])
@pytest.mark.parametrize("across", [False, True])
def test_the_operation_and_its_gradients(shape, out, rank, across):
    torch.manual_seed(1)
    leaves = [torch.randn(s).double().requires_grad_() for s in ((*shape, 11), (rank, 11), (out, rank))]
    (x, A, D), W = leaves, torch.randn(out, 11).double()
    y, want = low_rank_linear(x, W, A, D), low_rank_linear_reference(x, W, A, D)
    torch.testing.assert_close(y, want)
    dy = torch.randn(*shape[:-1], out, shape[-1]).double().mT if across else torch.randn_like(want)  # as whatever comes behind gives it
    for name, a, b in zip("xAD", *(torch.autograd.grad(z, leaves, dy) for z in (y, want)), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def found_in(model, taken=()):
    return alone.lone(model.model.layers, taken)


@pytest.mark.parametrize("method", [None, weft.DoRA(rank=3)])
def test_the_layer_and_whatever_else_reads_it(method):
    """Evaluation to the last bit, another adapter, merging, a weight that begins to train."""
    model, _ = model_of("Qwen2", method, extra=dict(attention_bias=True))
    weft.adapt(model, weft.LoRA(rank=2, lora_bias=True), name="other")
    weft.use(model, "default")
    ids, batch = torch.randint(97, (2, 12)), pad(rows([9, 4]))
    with torch.no_grad():
        logits, plain = model(ids).logits, loss_sum(model, batch).item()
    found = found_in(model)
    assert len(found) == (14 if method is None else 8)  # DoRA beside a bias is another formula
    calls = []
    module = alone.low_rank_linear
    alone.low_rank_linear = lambda *given: calls.append(len(given)) or module(*given)
    try:
        alone.install(found)
        assert abs(loss_sum(model, batch).item() / plain - 1) < 1e-5 and len(calls) == len(found)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
        calls.clear()
        with weft.using(model, "other"):
            loss_sum(model, batch)
        assert not calls
        weft.merge(model, "default")
        merged = loss_sum(model, batch).item()
        assert not calls and abs(merged / plain - 1) < 1e-4
        weft.unmerge(model)
        model.model.layers[0].self_attn.o_proj.weight.requires_grad_()
        loss_sum(model, batch).backward()
        assert len(calls) == len(found) - 1 and model.model.layers[0].self_attn.o_proj.weight.grad is not None
    finally:
        alone.low_rank_linear = module
        alone.uninstall(found)
    assert not any("forward" in vars(m) for m in model.modules())


def test_which_are_taken():
    method = weft.LoRA(rank=2)
    model, _ = model_of(method=method)
    attention = model.model.layers[0].self_attn
    assert len(found_in(model)) == 14 and len(found_in(model, [attention.o_proj])) == 13
    attention.o_proj.register_forward_hook(lambda *_: None)
    assert len(found_in(model)) == 13
    for other in (weft.LoRA(rank=65), weft.LoRA(rank=2, lora_bias=True), weft.LoRA(rank=2, dropout=0.1), weft.LoKr(rank=2)):
        model, _ = model_of(method=other)
        assert not found_in(model), other
    model, _ = model_of(method=weft.LoRA(rank=2, targets=["o_proj", "lm_head"]))
    assert {*found_in(model).values()} == {"o_proj"}
    model, _ = model_of(base="nf4")
    assert not found_in(model)


@quiet
def test_with_little_memory_no_product_is_made_again_that_nobody_needs(monkeypatch):
    """Of a layer that is computed again S is kept: of down, whose output nobody wants twice, only the backward product is left."""
    module, made = importlib.import_module("weft.kernels.low_rank_linear"), []
    right = module._sum
    monkeypatch.setattr(module, "_sum", lambda S, D, x, W: made.append(tuple(W.shape)) or right(S, D, x, W))
    model, parameters = model_of(extra=dict(intermediate_size=112))
    batch = pad(rows([9, 4, 7]))
    fast = prepare(model, batch, parameters, compile=True, memory=0.1, self_check=False)
    made.clear()
    fast.loss(batch).backward()
    assert made.count((112, 32)) == made.count((32, 112)) == 2, made  # down of two layers, forward and back
    fast.close()


@quiet
@pytest.mark.parametrize("broken", ["wrong", "failing"])
def test_it_goes_first(monkeypatch, broken):
    def other(*given):
        if broken == "failing":
            raise RuntimeError("no such operation")
        return 1.1 * low_rank_linear(*given)

    monkeypatch.setattr(alone, "low_rank_linear", other)
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    model, parameters = model_of()
    said = []
    fast = prepare(model, pad(rows([9, 4, 7])), parameters, compile=True, say=said.append)
    assert len(said) == 1 and "o of 2 layers are not one operation" in said[0], said
    assert ("does not agree" if broken == "wrong" else "no such operation") in said[0]
    assert fast.compiled and len(fast.inside.mlps) == 2 and not fast.inside.lone and "one operation" not in fast.describe()
    fast.close()
    assert not any("forward" in vars(m) for m in model.modules())
