"""Runs whose LoRA begins from the data (EVA) or from what packing the base lost (LoftQ). That they resume exactly: test_resume.py."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import Tensor

import weft
from weft.cli.main import main
from weft.core import METHODS, WeftError
from weft.train import load_recipe, run_recipe, run_recipes
from weft.train.output import Output
from weft.train.single import RunData
from weft.train.start import load

STILL = {"train__steps": 1, "train__lr": 1e-12, "method__dropout": 0.0, "method__rank": 6}  # a run that ends where it began


def adapters(folder: Path) -> dict[str, Any]:
    return dict(weft.adapters.attached(weft.load(tiny_run.model(), folder), "default"))


def plain(folder: Path) -> None:
    """The file and its card are those of any LoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["init_lora_weights"] is True and config["r"] == 6
    assert "eva" not in (folder / "README.md").read_text() + json.dumps(config)


def inputs(recipe: weft.Recipe) -> dict[str, Tensor]:
    """What flows into each layer over all training rows, (rows, in), one row of data at a time."""
    model, seen, handles = tiny_run.model(), {}, []
    for path in adapters(Path(recipe.output)):
        keep = seen.setdefault(path, [])
        handles.append(model.get_submodule(path).register_forward_pre_hook(lambda m, x, keep=keep: keep.append(x[0][0])))
    for example in RunData(tiny_run.model(), recipe, tiny_run.tokenizer()).batches.examples:
        model(torch.from_numpy(example.ids.astype("int64"))[None])
    return {path: torch.cat(rows) for path, rows in seen.items()}


@pytest.mark.parametrize("packing", [True, False])
def test_eva_begins_with_the_main_directions_of_the_training_data(packing: bool, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path, method__init="eva", data__packing=packing, train__tokens=4096, **STILL)
    weft.fit(tiny_run.model(), recipe, tokenizer=tiny_run.tokenizer())
    plain(tmp_path / "out")
    found = adapters(tmp_path / "out")
    assert len(found) == 14
    for path, X in inputs(recipe).items():
        A = found[path].A.detach()
        assert torch.allclose(A @ A.T, torch.eye(6), atol=1e-4), path
        best = torch.linalg.svdvals(X)[:6].square().sum()
        share = float((X @ A.T).square().sum() / best)
        assert share > (0.9999 if packing else 0.9), (path, share)  # row by row a direction that comes late may be lost


def folder(where: Path) -> Path:
    tiny_run.model().save_pretrained(where / "base")
    tiny_run.tokenizer().save_pretrained(where / "base")
    return where / "base"


def test_loftq_begins_with_what_packing_lost(tmp_path: Path) -> None:
    base = folder(tmp_path)
    recipe = tiny_run.recipe(tmp_path, model=str(base), base="nf4", method__init="loftq", **STILL)
    run_recipe(recipe)
    plain(tmp_path / "out")
    assert isinstance(recipe.method, weft.LoRA)
    mine, whole = weft.load(weft.load_base(base, base="nf4"), tmp_path / "out"), weft.load_base(base, base="fp32")
    by_hand = weft.loftq_(weft.load_base(base, base="bf16" if mine.dtype == torch.bfloat16 else "fp32"), recipe.method)
    for path, adapter in weft.adapters.attached(by_hand, "default").items():
        got = weft.adapters.attached(mine, "default")[path]
        assert torch.allclose(got.B @ got.A, adapter.B @ adapter.A, atol=1e-5) and adapter.B.any(), path  # type: ignore[operator]
    ids = torch.arange(20)[None]
    want = whole(ids).logits
    with weft.using(mine, None):
        off = (mine(ids).logits - want).norm()
    assert (mine(ids).logits - want).norm() < 0.8 * off


def test_side_by_side(tmp_path: Path) -> None:
    first = tiny_run.recipe(tmp_path, model=str(folder(tmp_path)), base="nf4", **STILL)
    methods = {"usual": {}, "seen": {"init": "eva"}, "lost": {"init": "loftq"}, "less": {"init": "loftq", "rank": 2}}
    recipes = [replace(first, name=k, output=str(tmp_path / k), method=replace(first.method, **m)) for k, m in methods.items()]
    run_recipes(recipes)
    for recipe in recipes:
        alone = replace(recipe, output=f"{recipe.output}-alone")
        run_recipe(alone)
        together, by_itself = adapters(Path(recipe.output)), adapters(Path(alone.output))
        for path, a in together.items():
            assert torch.allclose(a.A, by_itself[path].A, atol=1e-6) and torch.allclose(a.B, by_itself[path].B, atol=1e-6), path
    assert not any(torch.equal(adapters(tmp_path / "usual")[p].A, a.A) for p, a in adapters(tmp_path / "seen").items())


def test_what_cannot_begin_so_is_told(tmp_path: Path) -> None:
    data = {"data": {"train": "rows.jsonl"}}
    for given, said in (
        ({"method.init": "loftq"}, "base is 'auto': write base: nf4"),
        ({"method.init": "loftq", "base": "bf16"}, "base is 'bf16': write base: nf4"),
        ({"method": "DoRA", "method.init": "eva"}, "init='eva': that start is for weft.LoRA alone"),
        ({"method": "IA3", "method.init": "eva"}, "method.init: unknown"),
    ):
        with pytest.raises(WeftError, match=said):
            load_recipe(data, given)
    for init, said in (("eva", r"weft\.eva\(model, method, batches\)"), ("loftq", r"weft\.loftq_\(model, method, 'nf4'\)")):
        with pytest.raises(WeftError, match=said):
            weft.adapt(tiny_run.model(), weft.LoRA(init=init))
    base = folder(tmp_path)
    head = tiny_run.recipe(tmp_path, model=str(base), base="nf4", method__init="loftq", method__targets=["q_proj", "lm_head"])
    with pytest.raises(WeftError, match="lm_head would not be packed: exclude='lm_head'"):
        run_recipe(head)
    wide = tiny_run.recipe(tmp_path, model=str(base), base="nf4", method__init="loftq", method__rank=40)
    with pytest.raises(WeftError, match="has 16 directions at most, and the rank is 40"):
        run_recipe(wide)
    here = tiny_run.recipe(tmp_path, base="nf4", method__init="loftq")
    with pytest.raises(WeftError, match=r"weft.loftq_\(model, method, 'nf4', name='default'\)"):
        weft.fit(tiny_run.model(), here, tokenizer=tiny_run.tokenizer())
    few = tiny_run.recipe(tmp_path, method__init="eva", method__rank=32, method__targets="down_proj", data__eval=None)
    Path(few.data.train if isinstance(few.data.train, str) else few.data.train[0]).write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(WeftError, match="too few inputs"):
        weft.fit(tiny_run.model(), few, tokenizer=tiny_run.tokenizer())
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_packed_in_its_file_has_lost_nothing(tmp_path: Path) -> None:
    base = folder(tmp_path)
    assert main(["quantize", str(base), "--base", "nf4", "--output", str(tmp_path / "packed")]) == 0
    recipe = tiny_run.recipe(tmp_path, model=str(tmp_path / "packed"), base="nf4", method__init="loftq")
    with pytest.raises(WeftError, match="packed is packed in its file: give the 16-bit one"):
        run_recipe(recipe)


def damaged(where: Path) -> Path:
    """A model's folder whose weights cannot be read: whoever tells something else has not tried."""
    base = folder(where)
    (base / "model.safetensors").write_bytes(b"no weights")
    return base


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method__targets": ["q_prj", "v_proj"]}, "targets='q_prj' matches no module; did you mean 'q_proj'?"),
        ({"method__targets": "norm"}, "matches only LlamaRMSNorm (model.norm), which LoRA cannot adapt"),
        ({"method__modules_to_save": ["scores"]}, "modules_to_save='scores' matches no module"),
        ({"method__layers_to_transform": [1, 7]}, "layers_to_transform=7: none of the targets lies in a layer of that number"),
        ({"method__target_parameters": ["experts.gate"], "method__dropout": 0.0}, "target_parameters='experts.gate' matches no parameter"),
        ({"method__targets": "q_prj", "method__init": "eva"}, "did you mean 'q_proj'?"),
        ({"method__targets": "q_prj", "method__init": "loftq"}, "did you mean 'q_proj'?"),
        ({"method": "BitFit"}, "this model has nothing that BitFit can adapt"),
        ({"name": "a.b"}, "'a.b' cannot name an adapter"),
        ({}, "header"),  # nothing wrong but the weights
    ],
)
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_what_cannot_be_adapted_is_told_before_weights_are_read(more: dict[str, Any], said: str, base: str, tmp_path: Path) -> None:
    if more.get("method__init") == "loftq" and base != "nf4":
        return
    recipe = tiny_run.recipe(tmp_path, model=str(damaged(tmp_path)), base=base, **more)
    with pytest.raises(WeftError) as caught:
        run_recipe(recipe)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(("rows", "said"), [
    (None, "data file not found"), ('{"text": "a"}\n{"text": 3}\n', "'text' must be a text"), ('{"text": "a"}\n', "needs held-out rows"),
])  # fmt: skip
@pytest.mark.parametrize("several", [False, True])
def test_rows_that_cannot_be_used_are_told_before_weights_are_read(rows: str | None, said: str, several: bool, tmp_path: Path) -> None:
    if rows is not None:
        (tmp_path / "these.jsonl").write_text(rows)
    data = {"data__train": str(tmp_path / "these.jsonl"), "data__eval": None, "eval__exact_match": True}
    recipe = tiny_run.recipe(tmp_path, model=str(damaged(tmp_path)), **data)
    with pytest.raises(WeftError, match=said):
        if several:
            run_recipes([replace(recipe, name=name, output=str(tmp_path / name)) for name in ("a", "b")])
        else:
            run_recipe(recipe)


def test_of_several_runs_all_that_cannot_be_adapted_is_told_at_once(tmp_path: Path) -> None:
    one = tiny_run.recipe(tmp_path, model=str(damaged(tmp_path)))
    runs = [
        replace(one, name=name, output=str(tmp_path / name), method=replace(one.method, targets=targets))
        for name, targets in (("a", "q_prj"), ("b", "q_proj"), ("c", "v_prj"))
    ]
    with pytest.raises(WeftError) as caught:
        run_recipes(runs)
    assert re.findall(r"^run (\w): targets='(\w+)' matches no module", str(caught.value), re.M) == [("a", "q_prj"), ("c", "v_prj")]


NEEDED = {"ALoRA": {"invocation_tokens": (5, 6)}, "TrainableTokens": {"tokens": (3, 5)}}


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_weights_are_not_needed_to_tell_what_can_be_adapted(name: str, base: str, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path, model=str(folder(tmp_path)), base=base)
    recipe = replace(recipe, method=METHODS[name](**NEEDED.get(name, {})))
    told: list[str | None] = []
    for attempt in (lambda: load([recipe], [Output(recipe)]), lambda: weft.adapt(weft.load_base(recipe.model, base, "cpu"), recipe.method)):
        try:
            attempt()
            told.append(None)
        except WeftError as e:
            told.append(str(e))
    assert told[0] == told[1] and (told[0] is None or name == "BitFit")
