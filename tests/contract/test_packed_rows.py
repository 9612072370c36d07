"""Rows of a packed batch, each span of tokens through its owner's adapter: as one by one, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.conftest import llama

OTHERS = {"DoRA": {"rank": 3}, "VeRA": {"rank": 3}, "IA3": {}, "OFT": {}, "LoHa": {"rank": 2}, "Full": {},
          "LoRA": {"rank": 3}}  # fmt: skip
LINEAR = ["0", "2"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 12, bias=False))


def adapted(*methods: tuple[str, dict[str, Any]]) -> nn.Module:
    model = net()
    for i, (name, given) in enumerate(methods):
        weft.adapt(model, getattr(weft, name)(targets=LINEAR, **given), name="abc"[i])
    with torch.no_grad():
        for p in (p for n in "abc"[: len(methods)] for p in weft.adapters.trainable(model, n).values()):
            p.add_(0.3 * torch.randn_like(p))
    return model


def routed(model: nn.Module, x: Tensor, owners: list[str | None], lengths: tuple[int, ...]) -> Tensor:
    with weft.rows(model, owners, lengths):
        return model(x)  # type: ignore[no-any-return]


def one_by_one(model: nn.Module, x: Tensor, owners: list[str | None], lengths: tuple[int, ...]) -> Tensor:
    parts = []
    for name, part in zip(owners, x.split(lengths, 1), strict=True):
        with weft.adapters.using(model, name):
            parts.append(model(part))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("lengths", [(3, 4, 7, 0), (5, 2, 1, 6), (1, 30, 2, 2)])  # in the first two, owners have as many tokens
@pytest.mark.parametrize("second", OTHERS)
def test_as_one_by_one(second: str, lengths: tuple[int, ...]) -> None:
    model = adapted(("LoRA", {"rank": 5, "rslora": True}), (second, OTHERS[second]))
    for owners in (["a", "a", "b", "b"], ["b", "b", None, "a"], ["b", "a", "b", None]):
        x = torch.randn(1, sum(lengths), 20, requires_grad=True)
        got, want = (way(model, x, owners, lengths) for way in (routed, one_by_one))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        g = torch.randn_like(want)
        for a, b in zip(gradients(model, x, got, g), gradients(model, x, want, g), strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


def gradients(model: nn.Module, x: Tensor, y: Tensor, g: Tensor) -> list[Tensor]:
    parameters = [p for n in "ab" for p in weft.adapters.trainable(model, n).values()]
    found = torch.autograd.grad(y, [x, *parameters], g, allow_unused=True)
    return [torch.zeros_like(p) if d is None else d for p, d in zip([x, *parameters], found, strict=True)]


def test_only_where_every_token_is_seen() -> None:
    model = adapted(("LoRA", {"rank": 2}))
    short = pytest.raises(weft.WeftError, match=r"rows of a packed batch.*6 tokens came and the rows have 7: pad the rows")
    with short, weft.rows(model, ["a", None], [3, 4]):
        model(torch.randn(1, 6, 20))
    with pytest.raises(weft.WeftError, match="2 rows have names and 1 have lengths"), weft.rows(model, ["a", None], [7]):
        pass
    model = llama()
    assert weft.adapters.by_token(model, weft.LoRA(rank=2), "a") and weft.adapters.by_token(model, weft.DoRA(rank=2), "a")
    for method in (weft.LoRA(targets=["lm_head", "q_proj"]), weft.LoRA(targets=["embed_tokens"]), weft.PromptTuning(tokens=3), weft.Full(),
                   weft.LNTuning(), weft.ALoRA(invocation_tokens=[5])):  # fmt: skip
        assert not weft.adapters.by_token(model, method, "a")
    weft.adapt(model, weft.PrefixTuning(tokens=2), name="b")
    assert not weft.adapters.by_token(model, weft.LoRA(), "b"), "what is there counts"
