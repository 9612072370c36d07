"""Wherever the moments lie, the update is AdamW's, and a run goes on bit for bit."""

from __future__ import annotations

import importlib.util

import pytest
import tiny_run
import torch
from torch import nn

import weft
from weft.train import optimisers
from weft.train.flat import Flat

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")  # bitsandbytes', which then does as "adamw"

NAMES = ["adamw", "adamw-8bit", "adamw-offload", "adamw-paged"]
HERE = [n for n in NAMES if n != "adamw-paged" or importlib.util.find_spec("bitsandbytes")]


def made(name: str, ratio: float = 4.0, sizes: tuple[int, int] = (300, 77)) -> tuple[list[nn.Parameter], Flat, optimisers.Optimiser]:
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(sizes[0], 5)), "b": nn.Parameter(torch.randn(sizes[1]))}
    flat = Flat(parameters, lambda n: ratio if n == "b" else 1.0)
    return list(parameters.values()), flat, optimisers.make(name, flat, (0.9, 0.99), 1e-8, 0.1)


def step(flat: Flat, optimiser: optimisers.Optimiser, number: int) -> None:
    flat.grad.copy_(torch.randn(flat.grad.shape, generator=torch.Generator().manual_seed(number)))
    optimiser.step(0.01)
    flat.zero_grad()


@pytest.mark.parametrize("piece", [256, 1 << 20])
@pytest.mark.parametrize("name", HERE[1:])
def test_it_is_adamw(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers, "PIECE", piece)
    runs = [made(n) for n in ("adamw", name)]
    start = runs[0][1].data.clone()
    for number in range(6):
        for _, flat, optimiser in runs:
            step(flat, optimiser, number)
    (_, want, _), (_, got, _) = runs
    if name == "adamw-offload":
        assert torch.equal(got.data, want.data)
    else:  # bitsandbytes adds eps before it corrects the bias of the second moment, and decays after the update
        limit = 5e-2 if name == "adamw-8bit" else 2e-3
        assert (got.data - want.data).norm() < limit * (want.data - start).norm()


def test_eight_bits_do_not_depend_on_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for piece in (256, 1024, 1 << 20):
        monkeypatch.setattr(optimisers, "PIECE", piece)
        _, flat, optimiser = made("adamw-8bit")
        for number in range(3):
            step(flat, optimiser, number)
        found.append(flat.data.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_and_its_error(signed: bool) -> None:
    values = optimisers.dynamic_map(signed)
    assert len(values.unique()) == 256 and values.max() == 1 and (values == 0).sum() == 1 and torch.equal(values, values.sort().values)
    assert values.min() == (-0.99296875 if signed else 0)
    x = torch.randn(1000) * 10 ** (3 * torch.rand(1000) - 2)
    x = x if signed else x.abs()
    rest = optimisers.Bytes(1000, signed, torch.device("cpu"))
    assert not rest.read(0, 1000).any()
    rest.write(0, x[:512])
    rest.write(512, x[512:])
    near = (x.view(-1)[:, None] - values * rest.scale.repeat_interleave(256)[:1000, None]).abs().min(1).values
    assert torch.allclose((rest.read(0, 1000) - x).abs(), near, rtol=1e-4, atol=1e-6)
    rest.write(0, torch.zeros(512))
    assert not rest.read(0, 512).any()


def test_eight_bits_take_a_quarter() -> None:
    _, flat, optimiser = made("adamw-8bit", sizes=(40_000, 256))
    held = sum(v.nbytes for k, v in optimiser.state().items() if k != "masters")
    assert held < 2.04 * flat.data.numel()


@pytest.mark.parametrize("name", HERE)
def test_state_is_exact(name: str) -> None:
    _, flat, optimiser = made(name)
    fresh = {k: v.clone() for k, v in optimiser.state().items()}
    for number in range(3):
        step(flat, optimiser, number)
    kept = {k: v.clone() for k, v in optimiser.state().items()}
    for number in range(3, 5):
        step(flat, optimiser, number)
    for state, first in ((kept, 3), (fresh, 0)):
        _, again, other = made(name)
        other.load_state(state)
        for number in range(first, 5):
            step(again, other, number)
        assert torch.equal(again.data, flat.data)


@pytest.mark.parametrize("name", HERE[1:])
def test_a_run_that_was_stopped_goes_on(name: str, tmp_path) -> None:
    """Two recipes of one course, one of which stops half way and is started again."""
    files = {}
    for folder, halt in (("calm", None), ("wild", 4)):
        (tmp_path / folder).mkdir()
        recipe = tiny_run.recipe(tmp_path / folder, train__optimiser=name, train__steps=8, train__save_every=2, method__lr_ratio=4.0)

        def stop(event, halt=halt):
            if halt and event["event"] == "save" and event["step"] == halt:
                raise KeyboardInterrupt

        if halt:
            with pytest.raises(KeyboardInterrupt):
                weft.fit(tiny_run.model(), recipe, tokenizer=tiny_run.tokenizer(), on_event=stop)
        weft.fit(tiny_run.model(), recipe, tokenizer=tiny_run.tokenizer())
        files[folder] = (tmp_path / folder / "out" / "adapter_model.safetensors").read_bytes()
    assert files["calm"] == files["wild"]


def test_paged_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(weft.WeftError, match="bitsandbytes"):
        made("adamw-paged")
