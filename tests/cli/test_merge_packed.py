"""`weft merge` of an adapter that was trained on a packed base: two honest merges, and a refusal of the third."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weft
from tests.cli.conftest import Ran, World, snapshot
from weft.quant import is_quantised

Run = Callable[..., Ran]
IDS = torch.arange(5, 14)[None]


@torch.no_grad()
def logits(folder: Path, base: str, adapter: Path | None = None) -> torch.Tensor:
    model = weft.load_base(folder, base, "cpu")
    if adapter:
        weft.load(model, adapter)
    return model.float()(IDS).logits  # packed weights decode to fp32 then


def test_onto_the_source_and_onto_what_was_trained(world: World, run: Run, tmp_path: Path) -> None:
    words = ["merge", "--model", world.base, "--adapter", world.a, "--base", "nf4", "--device", "cpu"]
    for onto, base in (("source", "fp32"), ("trained", "nf4")):
        ran = run(*words, "--onto", onto, "--dtype", "fp32", "-o", tmp_path / onto)
        assert ran.code == 0, ran.err
        kept = [float(k) for k in re.findall(r"│ \S+proj\s+│ +[\d.]+ │ +([\d.]+) │", ran.out)]
        assert len(kept) == 14 and all(abs(k - 1) < 1e-2 for k in kept)
        assert ("-" in ran.out.split("proj")[1]) == (onto == "trained")
        wanted = logits(world.base, base, world.a)
        assert (logits(tmp_path / onto, "fp32") - wanted).norm() < 0.02 * wanted.norm()
        assert not any(map(is_quantised, weft.load_base(tmp_path / onto, device="cpu").modules()))


def test_into_four_bits(world: World, run: Run, tmp_path: Path) -> None:
    ran = run("merge", "--model", world.base, "--adapter", world.a, "--base", "nf4", "--into", "nf4", "-o", tmp_path / "packed")
    assert ran.code == 0, ran.err
    assert sum(map(is_quantised, weft.load_base(tmp_path / "packed", device="cpu").modules())) == 14
    kept = [float(k) for k in re.findall(r"│ \S+proj\s+│ +[\d.]+ │ +([\d.]+) │", ran.out)]
    assert len(kept) == 14 and all(0.7 < k < 1.3 for k in kept)
    ran = run("generate", "--model", tmp_path / "packed", "hello", "--max-tokens", 2)
    assert ran.code == 0
    before = snapshot(tmp_path)
    ran = run("merge", "--model", tmp_path / "packed", "--adapter", world.a, "-o", tmp_path / "again")
    assert ran.code == 2 and "--onto trained" in ran.err
    assert snapshot(tmp_path) == before
    assert run("merge", "--model", tmp_path / "packed", "--adapter", world.a, "--onto", "trained", "-o", tmp_path / "again").code == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [(["--base", "nf4", "--onto", "trained", "--into", "nf4"], "1.5%"), (["--into", "bf16"], "no packed format"),
     (["--onto", "trained"], "trained on a plain base")],
)  # fmt: skip
def test_what_is_refused(more: list[str], says: str, world: World, run: Run, tmp_path: Path) -> None:
    ran = run("merge", "--model", world.base, "--adapter", world.a, "-o", tmp_path / "out", *more)
    assert ran.code == 2 and says in ran.err and snapshot(tmp_path) == {}
