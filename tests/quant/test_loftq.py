"""LoftQ: the error it leaves, against figures measured before, and a model that it packs."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.conftest import gpt2, llama
from weft.adapters.loftq import alternate, loftq_
from weft.quant import quantise_, roundtrip


def test_the_error_falls_with_each_round() -> None:
    torch.manual_seed(0)
    W = torch.randn(1024, 1024) * 0.02
    found = [float((W - roundtrip(W, "nf4")).norm() / W.norm())]
    for rounds in (1, 2):
        left, B, A = alternate(W, 16, "nf4", rounds)
        found.append(float((W - roundtrip(left, "nf4") - B @ A).norm() / W.norm()))
    assert found == pytest.approx([0.0920, 0.0893, 0.0866], abs=1e-3)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_base_and_adapter_together_are_closer_to_the_model(make, ids) -> None:
    want, plain = make()(ids).logits, make()
    quantise_(plain, "nf4")
    off = (plain(ids).logits - want).norm()
    method = weft.LoRA(rank=12, alpha=5.0)
    once, often = loftq_(make(), method), loftq_(make(), method, iterations=4)
    assert (often(ids).logits - want).norm() < (once(ids).logits - want).norm() < 0.8 * off
    with weft.using(once, None):
        assert torch.equal(once(ids).logits, plain(ids).logits), "one round leaves the base that all share"
    with pytest.raises(weft.WeftError, match="packed already: load the model in 16 bits"):
        loftq_(plain, method)
    with pytest.raises(weft.WeftError, match="exclude='lm_head'"):
        loftq_(make(), weft.LoRA(targets=("lm_head",)))
    with pytest.raises(weft.WeftError, match="the usual one"):
        loftq_(make(), weft.LoRA(init="pissa"))
