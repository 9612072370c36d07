"""What holds for every method on a full-precision base holds on a packed one: eager and compiled, and merging keeps the packed bytes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.conftest import jolt, llama
from tests.contract.test_contract import METHODS_TRIED
from weft.adapters import attached, trainable
from weft.quant import Quantised, dense, quantise_

BASES = {"nf4": dict(block=32), "int8": {}}


def quantised(base: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = llama(dtype=dtype)
    quantise_(model, base, **BASES[base])
    return model


def decoded(model: nn.Module) -> nn.Module:
    """The plain model with the same numbers."""
    plain = llama(dtype=model.lm_head.weight.dtype)
    for (path, a), (_, b) in zip(plain.named_modules(), model.named_modules(), strict=True):
        if isinstance(b, Quantised):
            a.weight.data.copy_(dense(b))
        else:
            assert type(a) is type(b), path
    return plain


def run(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


@pytest.fixture(params=[*(f"{method}/nf4" for method in METHODS_TRIED), *(f"{method}/int8" for method in ("lora", "lora-biases", "full"))])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, weft.Method]:
    method, _, base = request.param.partition("/")
    return quantised(base), METHODS_TRIED[method]("llama")


def adapted(model: nn.Module, method: weft.Method) -> nn.Module:
    torch.manual_seed(5)
    weft.adapt(model, method)
    jolt(model, size=0.03)
    return model


def test_every_method_works_as_on_the_plain_model_of_the_same_numbers(case: tuple, ids: Tensor, tmp_path: Path) -> None:
    model, method = case
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before, twin = run(model, ids), adapted(decoded(model), method)
    adapted(model, method)
    for each in (model, twin):
        run(each, ids).square().mean().backward()
    assert torch.allclose(run(model, ids), run(twin, ids), atol=1e-5)
    gradients = [[p.grad for p in trainable(m, "default").values()] for m in (model, twin)]
    for mine, its in zip(*gradients, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            assert torch.allclose(mine, its, atol=1e-5 * its.abs().max().item() + 1e-6)
    with weft.using(model, None):
        assert torch.equal(run(model, ids), before)
    weft.save(model, tmp_path, name="default")
    other = weft.load(quantised(model.model.layers[0].mlp.up_proj.form.name), tmp_path, name="x")
    assert torch.equal(run(other, ids), run(model, ids))
    weft.remove(model)
    assert torch.equal(run(model, ids), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and len(state) == len(model.state_dict())


def test_merging_is_one_plain_layer_and_unmerging_gives_the_packed_bytes_back(case: tuple, ids: Tensor) -> None:
    model, method = case
    if not method.mergeable:
        return
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    adapted(model, method)
    want = run(model, ids)
    for path, adapter in attached(model, "default").items():
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            probed, closed = super(type(adapter), adapter).merged(layer), adapter.merged(layer)
            assert all(torch.allclose(probed[k], v, atol=1e-5) for k, v in closed.items()), path
    weft.merge(model)
    assert torch.allclose(run(model, ids), want, atol=2e-5)
    weft.unmerge(model)
    assert torch.equal(run(model, ids), want)
    for key, value in model.state_dict().items():
        if key in state:
            assert value.data_ptr() == state[key][0] and torch.equal(value, state[key][1]), key
    plain = weft.merge(model, keep=False)
    assert torch.allclose(run(plain, ids), want, atol=2e-5)
    for module in plain.modules():
        assert type(module) is not nn.Linear or module.weight.dtype == torch.float32
    assert any(type(m) is nn.Linear for m in plain.model.modules()) or not isinstance(method, weft.LoRA)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own way of tracing a Function
@pytest.mark.parametrize("tried", ["lora/nf4", "full/nf4", "dora/nf4", "lora-biases/int8"])
def test_compiled_equals_eager_without_a_graph_break(tried: str, ids: Tensor) -> None:
    method, _, base = tried.partition("/")
    model = adapted(quantised(base), METHODS_TRIED[method]("llama"))
    torch._dynamo.reset()
    layer = model.model.layers[0]
    x = torch.randn(2, 5, 32)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    want = layer(x, position_embeddings=positions)
    want.square().mean().backward()
    own = [p for p in layer.parameters() if p.grad is not None]
    gradients = [p.grad.clone() for p in own]
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x, position_embeddings=positions)
    y.square().mean().backward()
    assert torch.allclose(y, want, atol=1e-5)
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(own, gradients, strict=True))


def test_rows_copies_and_pickles(case: tuple, ids: Tensor) -> None:
    model, method = case
    adapted(model, method)
    want = run(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, ids), want)
    with weft.using(model, None):
        bare = run(model, ids)
    with torch.no_grad(), weft.rows(model, ["default", None, "default", None, None]):
        mixed = run(model, ids)
    assert torch.allclose(mixed[[0, 2]], want[[0, 2]], atol=1e-5) and torch.allclose(mixed[[1, 3, 4]], bare[[1, 3, 4]], atol=1e-5)
