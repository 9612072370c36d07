"""weft combine and weft extract, through the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weft
from tests.cli.conftest import Ran, World, snapshot
from weft.adapters import attached

Run = Callable[..., Ran]


def test_combine(world: World, run: Run, tmp_path: Path) -> None:
    ran = run("combine", f"{world.a}=0.7", f"{world.b}=-0.3", "--model", world.base, "-o", tmp_path / "both")
    assert ran.code == 0, ran.err
    assert "100.00% of ‖ΔW‖² kept on 14 layers, rank 8" in ran.out
    model = weft.load_base(world.base)
    for name, folder in (("a", world.a), ("b", world.b), ("both", tmp_path / "both")):
        weft.load(model, folder, name)
    for path, part in attached(model, "both").items():
        a, b = attached(model, "a")[path], attached(model, "b")[path]
        wanted = 0.7 * a.scale * a.B @ a.A - 0.3 * b.scale * b.B @ b.A
        assert torch.allclose(part.scale * part.B @ part.A, wanted, atol=1e-5)
    again = ["combine", world.a, world.b, "--model", world.base, "--how", "ties", "--density", 0.5, "-o", tmp_path / "both"]
    assert run(*again).code == 2
    assert run(*again, "--overwrite").code == 0


def test_extract(world: World, run: Run, tmp_path: Path) -> None:
    model = weft.load(weft.load_base(world.base), world.a)
    weft.merge(model, keep=False).save_pretrained(tmp_path / "tuned")
    ran = run("extract", tmp_path / "tuned", "--model", world.base, "--rank", 4, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "100.00% of ‖ΔW‖² kept on 14 layers, rank 4" in ran.out
    ids = torch.arange(8)[None]
    got = weft.load(weft.load_base(world.base), tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(got(ids).logits, model(ids).logits, atol=1e-3)


def test_extract_keeps_on_request_what_no_lora_holds(world: World, run: Run, tmp_path: Path) -> None:
    model = weft.merge(weft.load(weft.load_base(world.base), world.a), keep=False)
    with torch.no_grad():
        model.model.norm.weight += 0.5
    model.save_pretrained(tmp_path / "tuned")
    ran = run("extract", tmp_path / "tuned", "--model", world.base, "--rank", 4, "-o", tmp_path / "less")
    size = model.model.norm.weight.numel()
    assert f"{size} numbers are left out: --modules-to-save changed keeps them whole" in " ".join(ran.out.split()), ran.out
    ids = torch.arange(8)[None]
    for named in ("changed", "norm"):
        ran = run("extract", tmp_path / "tuned", "--model", world.base, "--rank", 4, "-o", tmp_path / named, "--modules-to-save", named)
        assert ran.code == 0 and "kept whole" in ran.out and "left out" not in ran.out, ran.err
        got = weft.load(weft.load_base(world.base), tmp_path / named)
        with torch.no_grad():
            assert torch.allclose(got(ids).logits, model(ids).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["combine", "{a}=much", "-o", "{t}/new"], "'much' is no weight"),
        (["combine", "{a}", "-o", "{a}", "--overwrite"], "is one of the parts"),
        (["combine", "{a}", "{b}", "--how", "ties", "-o", "{t}/new"], "needs a density"),
        (["combine", "{a}", "nowhere", "-o", "{t}/new"], "there is no such folder"),
        (["combine", "{a}", "--how", "mean", "-o", "{t}/new"], "invalid choice"),
        (["extract", "{base}", "--model", "{base}", "-o", "{t}/new"], "has the same weights as"),
        (["extract", "nowhere", "--model", "{base}", "-o", "{t}/new"], "is no folder here"),
        (["extract", "{base}", "--model", "{base}", "--rank", "0", "-o", "{t}/new"], "a rank of 0"),
        (["extract", "{base}", "--model", "{base}", "--overwrite", "-o", "{base}"], "holds no adapter"),
    ],
)
def test_what_is_refused(words: list[str], says: str, world: World, run: Run, tmp_path: Path) -> None:
    before = snapshot(world.a.parent)
    filled = [w.format(a=world.a, b=world.b, base=world.base, t=tmp_path) for w in words]
    ran = run(*filled, *(["--model", world.base] if words[0] == "combine" else []))
    assert ran.code == 2 and says in ran.err, ran.err
    assert snapshot(world.a.parent) == before and not (tmp_path / "new").exists()
