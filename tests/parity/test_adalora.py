"""AdaLoRA beside peft's, step by step: the same triplets are dropped, and what is left goes both ways."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import weft
from tests.conftest import jolt

# peft checks its own AdaLoRA files as if rank_pattern were LoRA's
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
STEPS, TINIT, TFINAL, EVERY = 20, 3, 5, 2


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, peft.PeftModel]:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, tinit=TINIT, tfinal=TFINAL, deltaT=EVERY, total_step=STEPS,
                                target_modules=["0", "2", "4"])  # fmt: skip
    theirs = peft.get_peft_model(_net(), config)
    jolt(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "start")
    return weft.load(_net(), tmp_path / "start"), theirs


def test_the_schedule_and_the_triplets_are_peft_s(pair: tuple[nn.Module, peft.PeftModel], tmp_path: Path) -> None:
    ours, theirs = pair
    adapters = weft.adapters.attached(ours, "default")
    method = next(iter(adapters.values())).method
    mine = list(weft.adapters.trainable(ours, "default").values())
    its = [p for p in theirs.parameters() if p.requires_grad]
    optimisers = torch.optim.SGD(mine, lr=0.1), torch.optim.SGD(its, lr=0.1)
    allocator = theirs.base_model.rankallocator
    for step in range(STEPS):
        x, y = torch.randn(8, 10), torch.randn(8, 4)
        for model, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimiser.step()
        method.after_step(adapters, step, STEPS)
        theirs.base_model.update_and_allocate(step + 1)
        assert method.budget(step + 1, STEPS, 3) == allocator.budget_schedule(step + 1)[0]
        for path, a in adapters.items():
            layer = theirs.base_model.model.get_submodule(path)
            assert torch.allclose(a.E, layer.lora_E["default"], atol=1e-6), (step, path)
            assert torch.equal(a.E == 0, layer.lora_E["default"] == 0), (step, path)
    assert sum(int((a.E != 0).sum()) for a in adapters.values()) == 2 * 3
    assert {int((a.E != 0).sum()) for a in adapters.values()} != {2}, "the layers end with ranks of their own"

    x = torch.randn(5, 10)
    weft.save(ours, tmp_path / "ours")
    again, back = weft.load(_net(), tmp_path / "ours"), peft.PeftModel.from_pretrained(_net(), tmp_path / "ours")
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(again(x), ours(x), atol=1e-6) and torch.allclose(back(x), ours(x), atol=1e-6)
    assert sum(len(a.E) for a in weft.adapters.attached(again, "default").values()) == 2 * 3
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.allclose(weft.load(_net(), tmp_path / "theirs")(x), ours(x), atol=1e-6)
    weft.save(again, tmp_path / "twice")
    assert torch.equal(weft.load(_net(), tmp_path / "twice")(x), again(x))


def test_the_penalty_is_peft_s(pair: tuple[nn.Module, peft.PeftModel]) -> None:
    ours, theirs = pair
    mine = sum(a.penalty() for a in weft.adapters.attached(ours, "default").values())
    want = []
    for name, p in theirs.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            want.append((gram - torch.eye(len(gram))).norm())
    assert torch.allclose(mine, 0.5 * torch.stack(want).mean())


def test_the_penalty_makes_the_factors_orthogonal() -> None:
    model = weft.adapt(_net(), weft.AdaLoRA(rank=3, target_rank=2))
    adapters = weft.adapters.attached(model, "default")
    optimiser = torch.optim.Adam(weft.adapters.trainable(model, "default").values(), lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        sum(a.penalty() for a in adapters.values()).backward()
        optimiser.step()
    assert all(torch.allclose(a.A @ a.A.T, torch.eye(3), atol=0.1) for a in adapters.values())


def test_a_copy_goes_on_as_the_original_does() -> None:
    """All that the schedule remembers is in buffers."""
    model = weft.adapt(_net(), weft.AdaLoRA(rank=3, target_rank=1))
    jolt(model)

    def steps(model: nn.Module, first: int, last: int) -> None:
        adapters = weft.adapters.attached(model, "default")
        for step in range(first, last):
            torch.manual_seed(step)
            for p in weft.adapters.trainable(model, "default").values():
                p.grad = torch.randn_like(p)
            adapters["0"].method.after_step(adapters, step, 10)

    steps(model, 0, 5)
    twin = weft.adapt(_net(), weft.AdaLoRA(rank=3, target_rank=1))
    for path, a in weft.adapters.attached(model, "default").items():
        b = weft.adapters.attached(twin, "default")[path]
        b.load_state_dict(a.state_dict(), strict=True)
        for key, buffer in b.named_buffers():
            buffer.copy_(dict(a.named_buffers())[key])
    for m in (model, twin):
        steps(m, 5, 10)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copy.copy(twin).parameters(), strict=True))
