"""EVA: A spans what the inputs span, and ranks move without their sum changing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.conftest import gpt2, llama
from weft.adapters import active, attached, names
from weft.adapters.eva import eva


def test_A_holds_the_main_directions_of_the_inputs() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 3)).Q.T
    model = nn.Sequential(nn.Linear(12, 5))
    eva(model, weft.LoRA(rank=3), [torch.randn(9, 3) @ basis + 1e-4 * torch.randn(9, 12) for _ in range(4)])
    (adapter,) = attached(model, "default").values()
    assert torch.allclose(adapter.A @ adapter.A.T, torch.eye(3), atol=1e-5) and not adapter.B.any()
    assert torch.allclose(adapter.A @ basis.T @ basis, adapter.A, atol=1e-3)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_sum_of_ranks_stays(make, ids) -> None:
    model = make()
    before = model(ids).logits
    method = weft.LoRA(rank=4, alpha=6.0)
    eva(model, method, [{"input_ids": ids}, {"input_ids": ids + 1}], rho=2.0)
    weft.adapt(model, method, name="even")
    uneven, even = attached(model, "default"), attached(model, "even")
    ranks = [a.A.shape[0] for a in uneven.values()]
    assert sum(ranks) == 4 * len(even) and len(set(ranks)) > 1 and max(ranks) <= 8
    assert {round(a.scale, 6) for a in uneven.values()} == {1.5}
    with weft.using(model, "default"):
        assert torch.equal(model(ids).logits, before)
    with pytest.raises(weft.WeftError, match="too few inputs"):
        eva(model, method, [], name="none")
    assert names(model) == ["default", "even"] and active(model) == ("even",)
