"""The norm behind the layers as one kernel: which one it is, the same numbers, and when it is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import weft
from tests.step.test_loss import build, rows
from tests.step.test_stacked import model_of, quiet
from weft.data import pad
from weft.step import closing, loss_sum, prepare


@pytest.mark.parametrize(("kind", "taken"), [("Llama", True), ("Qwen3", True), ("Gemma3", False), ("GPT2", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_norm(kind, taken, dtype):
    model = build(kind, dict(n_embd=32, n_layer=2, n_head=4) if kind == "GPT2" else {}).requires_grad_(False).to(dtype)
    inner = model.transformer if kind == "GPT2" else model.model
    layers = list(inner.h if kind == "GPT2" else inner.layers)
    assert closing.closing(model, layers) is (inner.norm if taken else None)
    if taken:
        inner.norm.weight.requires_grad_()
        assert closing.closing(model, layers) is None
        inner.norm.weight.requires_grad_(False)
        inner.norm.register_forward_hook(lambda *_: None)
        assert closing.closing(model, layers) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_evaluation(dtype):
    torch.manual_seed(0)
    model, _ = model_of(dtype=dtype)
    norm = model.model.norm
    norm.weight.data.uniform_(0.5, 2)
    x, g = torch.randn(3, 7, 32, dtype=dtype), torch.randn(3, 7, 32, dtype=dtype)
    exact = x.double().requires_grad_()
    want = norm.weight.double() * exact * (exact.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    (slope,) = torch.autograd.grad(want, exact, g.double())
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        logits = model(ids).logits
    closing.install(norm)
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for found, exactly in ((y, want), (torch.autograd.grad(y, leaf, g)[0], slope)):
        assert (found.double() - exactly).norm() <= bound * exactly.norm()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert norm(leaf.double()).dtype == torch.float64  # of another type than its weight: as it is
    torch.testing.assert_close(norm(hidden_states=x), y, rtol=bound, atol=bound)
    closing.uninstall(norm)
    assert "forward" not in vars(norm)


def test_one_of_which_a_process_has_a_part_is_left_alone():
    """FSDP2 makes it whole only within the model's own forward."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = build("Llama", {}).requires_grad_(False)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert closing.closing(model, list(model.model.layers)) is None
    finally:
        dist.destroy_process_group()


def test_one_that_wants_more_is_left_alone():
    model = build("Llama", {}).requires_grad_(False)

    class Two(type(model.model.norm)):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states) * gate

    model.model.norm.__class__ = Two
    assert closing.closing(model, list(model.model.layers)) is None


@quiet
def test_one_that_is_wrong_is_left_out(monkeypatch):
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    model, parameters = model_of(method=weft.LoRA(rank=2, targets=["q_proj"], dropout=0.1))  # nothing else stands in for anything
    batch, said = pad(rows([9, 4, 7])), []
    want = loss_sum(model.eval(), batch).item()
    model.train()
    fast = prepare(model, batch, parameters, compile=True, say=said.append)
    assert not said and fast.inside.norm is model.model.norm and "the norm behind them one kernel" in fast.describe()
    fast.close()
    right = closing._norm
    monkeypatch.setattr(closing, "_able", lambda m: m is model.model.norm)
    monkeypatch.setattr(closing, "_norm", lambda m, x: 1.5 * right(m, x))
    fast = prepare(model, batch, parameters, compile=True, say=said.append)
    assert len(said) == 1 and "the norm behind the layers is not one kernel" in said[0], said
    assert fast.compiled and fast.inside.norm is None and abs(fast.loss(batch).item() / want - 1) < 0.2
    fast.close()
