"""The flat buffer computes what separate tensors would."""

from __future__ import annotations

import copy

import torch
from tests.conftest import llama
from torch import nn

import weft
from weft.adapters import trainable
from weft.train.flat import AdamW, Flat


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def ratio(name: str) -> float:
    return 4.0 if name.startswith("2") else 1.0


def test_equals_torch_adamw_on_separate_tensors():
    ours, theirs = make(), make()
    flat = Flat(dict(ours.named_parameters()), ratio)
    opt = AdamW(flat, (0.9, 0.99), 1e-8, 0.1)
    groups = [{"params": [p], "lr": 0.01 * ratio(n)} for n, p in theirs.named_parameters()]
    ref = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model(x).square().sum().backward()
        norm = flat.clip(1.0)
        want = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch.testing.assert_close(norm, want)
        opt.step(0.01)
        ref.step()
        assert flat.grad.any(), "a method may want the gradient after the step"
        flat.zero_grad()
        ref.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert isinstance(a, nn.Parameter)


def test_parameters_stay_ordinary_and_are_released():
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flat = Flat(dict(model.named_parameters()), lambda _: 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.untyped_storage().data_ptr() == flat.data.untyped_storage().data_ptr() for p in model.parameters())
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    flat.release()
    assert all(p.grad is None and torch.equal(p, before[k]) for k, p in model.named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(before)


def test_state_is_exact():
    model = make()
    flat = Flat(dict(model.named_parameters()), ratio)
    opt = AdamW(flat, (0.9, 0.99), 1e-8, 0.0)

    def step(m: nn.Module, o: AdamW) -> None:
        m(torch.ones(2, 5)).square().sum().backward()
        o.step(0.01)
        o.flat.zero_grad()

    step(model, opt)
    state = {k: v.clone() for k, v in opt.state().items()}
    step(model, opt)
    other = copy.deepcopy(make())
    again = AdamW(Flat(dict(other.named_parameters()), ratio), (0.9, 0.99), 1e-8, 0.0)
    again.load_state(state)
    step(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_writing_to_the_buffer_counts_as_writing_to_the_parameters():
    model = weft.adapt(llama(), weft.DoRA(rank=2))
    flat = Flat(trainable(model, "default"), lambda _: 1.0)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(ids).logits
        flat.data.add_(0.05)
        flat.touched()
        after = model(ids).logits
        assert torch.equal(after, copy.deepcopy(model)(ids).logits) and not torch.allclose(after, before, atol=1e-3)
