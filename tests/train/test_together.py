"""Several adapters trained at once end where each would have ended alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import weft
from weft.methods import lora_rows
from weft.train import Diverged, Interrupted, Recipe, load_recipes, run_recipes


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def three(folder: Path, **more: Any) -> list[Recipe]:
    """Other ranks, rates, seeds, lengths of run and data."""
    common = {"method__dropout": 0.0, "data__packing": False} | more
    return [
        tiny_run.recipe(folder, name="a", output=str(folder / "a"), **common),
        tiny_run.recipe(folder, name="b", output=str(folder / "b"), method__rank=2, train__lr=1e-3, seed=3, train__steps=13, **common),
        tiny_run.recipe(
            folder, name="c", output=str(folder / "c"), train__accumulate=2, data__train=str(tiny_run.rows(folder, 25, 5)), **common
        ),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("packing", [False, True])
def test_each_ends_where_it_would_have_ended_alone(tmp_path, packing):
    ends_as_alone(tmp_path, lambda folder: three(folder, data__packing=packing))


def ends_as_alone(tmp_path: Path, make: Callable[[Path], list[Recipe]]) -> list[dict[str, Any]]:
    """Holds all runs against their twins alone; the notes on the way."""
    together, alone, notes = tmp_path / "together", tmp_path / "alone", []
    together.mkdir(), alone.mkdir()
    results = weft.fit_together(tiny_run.model(), make(together), tokenizer=tiny_run.tokenizer(), on_event=notes.append)
    for recipe, result in zip(make(alone), results, strict=True):
        recipe = replace(recipe, train=replace(recipe.train, compile=False))
        by_itself = weft.fit(tiny_run.model(), recipe, tokenizer=tiny_run.tokenizer())
        ours, theirs = weights(result.adapter), weights(by_itself.adapter)
        assert list(ours) == list(theirs) and result.steps == by_itself.steps and result.tokens == by_itself.tokens
        for key, value in theirs.items():
            assert (ours[key] - value).norm() <= 1e-3 * value.norm(), (recipe.name, key)
        assert result.eval_loss == pytest.approx(by_itself.eval_loss, rel=1e-4)
        mine, its = ([(h["step"], h["lr"]) for h in r.history if "lr" in h] for r in (result, by_itself))
        assert mine == its
    return [e for e in notes if e["event"] == "note"]


compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")  # what torch's compiler itself causes


def alike(folder: Path, **more: Any) -> list[Recipe]:
    """Other ranks, rates and seeds; as many tokens in each batch."""
    common = {"method__dropout": 0.0, "train__steps": 5, "train__compile": True} | more
    return [tiny_run.recipe(folder, name=n, output=str(folder / n), method__rank=1 + 2 * i, train__lr=1e-3 * (1 + i), seed=i, **common)
            for i, n in enumerate("abc")]  # fmt: skip


def backend(monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    monkeypatch.setattr("weft.step.regions.inductor", how)


@compiling
def test_compiled_layers_with_a_batched_product_for_all(tmp_path):
    """By inductor. One graph for all steps and layers: whose the rows are is not in it. On a CPU packed attention stands outside."""
    counters.clear()
    notes = ends_as_alone(tmp_path, alike)
    assert all(e["name"] == "all runs" and "warning" not in e for e in notes)
    assert "2 layers compiled, no logits formed" in notes[0]["text"] and "self-check" in notes[1]["text"]
    broken = [reason for reason in counters["graph_break"] if "Skip calling `torch.compiler.disable()`d function" not in reason]
    assert not broken and counters["frames"]["total"] <= 8, (broken, counters["frames"])  # in training mode and for the check


@compiling
def test_compiled_layers_with_other_methods_lengths_and_ends(tmp_path, monkeypatch):
    backend(monkeypatch, "aot_eager")

    def several(folder):
        a, b, c = alike(folder)
        b = tiny_run.recipe(folder, name="b", output=b.output, method="DoRA", train__compile=True, train__steps=3, train__tokens=96)
        return [a, b, replace(c, train=replace(c.train, accumulate=2))]

    notes = ends_as_alone(tmp_path, several)
    assert "2 layers compiled" in notes[0]["text"]


def warnings_of(folder: Path, **more: Any) -> list[str]:
    notes: list[dict[str, Any]] = []
    weft.fit_together(tiny_run.model(), alike(folder, **more), tokenizer=tiny_run.tokenizer(), on_event=notes.append)
    assert all((folder / n / "adapter_model.safetensors").exists() for n in "abc")
    return [e["text"] for e in notes if e.get("warning")]


@compiling
def test_what_falls_back_is_told(tmp_path, monkeypatch):
    (padded,) = warnings_of(tmp_path, data__packing=False, train__steps=2)
    assert "padded rows" in padded and "not compiled" in padded


@compiling
@pytest.mark.parametrize("graphs", [True, False, None])
def test_graphs_are_for_all_runs_as_the_recipes_say(tmp_path, monkeypatch, graphs):
    """A CPU has none, and whoever asks for them is told so."""
    backend(monkeypatch, "aot_eager")
    said = warnings_of(tmp_path, train__steps=1, train__graphs=graphs)
    assert ["takes a CUDA device" in s for s in said] == ([True] if graphs else [])


@compiling
def test_layers_that_do_not_compile_run_as_they_are(tmp_path, monkeypatch):
    def broken(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such thing as a compiler")

    backend(monkeypatch, broken)
    (said,) = warnings_of(tmp_path)
    assert "could not be compiled" in said and "BackendCompilerFailed" in said


@compiling
def test_a_batched_product_that_is_wrong_is_named_and_not_used(tmp_path, monkeypatch):
    """Wrong where it is compiled alone, and for one of the adapters."""
    backend(monkeypatch, "aot_eager")
    right = lora_rows.side_by_side

    def wrong(mixture: Any, layer: Any, x: torch.Tensor) -> torch.Tensor:
        y = right(mixture, layer, x)
        return torch.cat([y[: len(y) // 3], 1.05 * y[len(y) // 3 :]]) if torch.compiler.is_compiling() else y

    monkeypatch.setattr(lora_rows, "side_by_side", wrong)
    (said,) = warnings_of(tmp_path)
    assert "does not agree with the plain one" in said and "b: model.layers.0" in said and "a: model.layers.0" not in said


def test_other_methods_and_dropout_side_by_side(tmp_path):
    model = tiny_run.model()
    names = {"lora": {"method__dropout": 0.1}, "full": {"method": "Full"}, "dora": {"method": "DoRA"}}
    names["alora"] = {"method": "ALoRA", "method__invocation_tokens": [tiny_run.ASSISTANT]}
    recipes = [tiny_run.recipe(tmp_path, name=n, output=str(tmp_path / n), train__steps=6, **more) for n, more in names.items()]
    results = weft.fit_together(model, recipes, tokenizer=tiny_run.tokenizer())
    assert [r.adapter.name for r in results] == list(names) and set(weft.adapters.names(model)) == set(names)
    assert all(r.history[0]["eval_loss"] == results[0].history[0]["eval_loss"] for r in results), "all start as the base"
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".weft." not in n)


def test_stopped_runs_go_on(tmp_path):
    def stop(event):
        if event["event"] == "step" and event["name"] == "b" and event["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"a after step \d+: .*; b after step 7: .*; c after step \d+: ") as stopped:
        weft.fit_together(tiny_run.model(), three(tmp_path), tokenizer=tiny_run.tokenizer(), on_event=stop)
    assert stopped.value.code == 128 + signal.SIGINT
    assert all(json.loads((tmp_path / n / "run.json").read_text())["status"] == "unfinished" for n in "abc")
    assert all(list((tmp_path / n / "checkpoints").iterdir()) for n in "abc")
    resumed = weft.fit_together(tiny_run.model(), three(tmp_path), tokenizer=tiny_run.tokenizer())
    whole = tmp_path / "whole"
    whole.mkdir()
    for there, again in zip(weft.fit_together(tiny_run.model(), three(whole), tokenizer=tiny_run.tokenizer()), resumed, strict=True):
        for key, value in weights(there.adapter).items():
            assert (weights(again.adapter)[key] - value).norm() <= 1e-3 * value.norm(), key


def stopped_at(name: str, event: str, step: int) -> Callable[[dict[str, Any]], None]:
    """Ctrl-C at this event of that run."""

    def stop(told: dict[str, Any]) -> None:
        if told["event"] == event and told["name"] == name and told.get("step") == step:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


def test_stopped_runs_on_padded_rows_go_on(tmp_path):
    """`weft train` looks at the folders before there is a model that says whether rows can be packed."""
    base = tmp_path / "base"
    tiny_run.model().save_pretrained(base), tiny_run.tokenizer().save_pretrained(base)
    recipes = [
        tiny_run.recipe(tmp_path, name=n, output=str(tmp_path / n), model=str(base), train__steps=6, method=m)
        for n, m in {"a": "DoRA", "b": "PromptTuning"}.items()
    ]
    with pytest.raises(Interrupted):
        run_recipes(recipes, on_event=stopped_at("b", "step", 3))
    other = [replace(r, data=replace(r.data, max_length=9)) for r in recipes]
    with pytest.raises(weft.WeftError, match=r"another recipe:\n  data.max_length: None there, 9 here\nChoose"):
        run_recipes(other)
    results = run_recipes(recipes)
    assert [r.steps for r in results] == [6, 6] and [h["step"] for h in results[1].history if "loss" in h] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(weft.WeftError, match="finished run"):
        run_recipes(recipes)


def test_a_run_that_was_over_is_not_trained_again(tmp_path):
    """Neither when a longer one is stopped, nor when one is stopped that answers after it."""

    def make() -> list[Recipe]:
        common = {"eval__exact_match": True, "method__dropout": 0.0}
        return [tiny_run.recipe(tmp_path, name=n, output=str(tmp_path / n), train__steps=s, **common) for n, s in {"a": 3, "b": 8}.items()]

    for event in (("b", "step", 6), ("b", "step", 8)):
        with pytest.raises(Interrupted, match=r"a after step 3: .*; b after step"):
            weft.fit_together(tiny_run.model(), make(), tokenizer=tiny_run.tokenizer(), on_event=stopped_at(*event))
        assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000003"]
        assert all(json.loads((tmp_path / n / "run.json").read_text())["status"] == "unfinished" for n in "ab")
    said: list[dict[str, Any]] = []
    results = weft.fit_together(tiny_run.model(), make(), tokenizer=tiny_run.tokenizer(), on_event=said.append)
    assert [r.steps for r in results] == [3, 8] and all(r.exact_match is not None for r in results)
    assert not [e for e in said if e["event"] == "step"], "both were over"
    assert [h["step"] for h in results[0].history if "loss" in h] == [1, 2, 3]


@pytest.mark.parametrize("packing", [False, True])
def test_one_that_diverges_does_not_stop_the_others(tmp_path, packing):
    recipes = three(tmp_path, data__packing=packing)
    recipes[1] = tiny_run.recipe(tmp_path, name="b", output=str(tmp_path / "b"), train__lr=1e30, train__clip=0.0)
    with pytest.raises(Diverged, match=r"1 of 3 runs diverged(.|\n)*b: stopped at step"):
        weft.fit_together(tiny_run.model(), recipes, tokenizer=tiny_run.tokenizer())
    assert all((tmp_path / n / "adapter_model.safetensors").exists() for n in "ac")
    assert not (tmp_path / "b" / "adapter_model.safetensors").exists()


def test_what_cannot_go_together_is_told_at_once(tmp_path):
    same = [tiny_run.recipe(tmp_path), tiny_run.recipe(tmp_path, model="elsewhere", train__graphs=False)]
    told = r"model must be one(.|\n)*train.graphs must be one(.|\n)*name: 'default' is that of 2 runs(.|\n)*output: "
    with pytest.raises(weft.WeftError, match=told):
        weft.fit_together(tiny_run.model(), same, tokenizer=tiny_run.tokenizer())


def test_a_recipe_with_runs():
    runs = [{"name": "a", "method": {"alpha": 3}}, {"name": "b", "method": "Full", "train.lr": 1e-4, "output": "there"}]
    tree = {"data": {"train": "x"}, "method": {"rank": 4}, "output": "sweep", "runs": runs}
    a, b = load_recipes(tree, ["--train.steps", "5"])
    assert (a.method.rank, a.method.alpha, a.output, a.train.steps) == (4, 3, "sweep/a", 5)
    assert (type(b.method).__name__, b.train.lr, b.output, b.name) == ("Full", 1e-4, "there", "b")
    assert load_recipes(tree, {"output": "other"})[0].output == "other/a"
    for runs, message in (
        ([], "runs: expected a list"),
        ([{"rank": 3}], "number 1 of 1 has no name"),
        ([{"name": "a"}] * 2, "two runs are named a"),
        ([{"name": "a", "method.rnk": 3}, {"name": "b"}], r"cannot be used:\n  run a: method.rnk: unknown; did you mean"),
    ):
        with pytest.raises(weft.WeftError, match=message):
            load_recipes(tree | {"runs": runs})


def test_all_that_is_wrong_with_runs_is_told_at_once():
    """What is wrong with all of them, once."""
    runs = [{"name": "a", "method": {"rank": 0}}, {"seed": 1}, {"name": "b", "train.lr": -1}, {"name": "b", "data.eval": "y"}, 3]
    tree = {"data": {"train": "x", "eval_split": 0.1}, "train": {"step": 3}, "runs": runs}
    with pytest.raises(weft.WeftError) as caught:
        load_recipes(tree, ["--train.keep", "0", "oops"])
    lines = [line.strip() for line in str(caught.value).splitlines()]
    wanted = [
        "the recipe cannot be used:", "runs: number 2, 5 of 5 has no name", "runs: two runs are named b", "oops: expected a flag",
        "train.step: unknown; did you mean train.steps?", "train.keep: 0 must be at least 1", "run a: method", "run b: train.lr: -1.0",
        "run b: data.eval names held-out rows, and data.eval_split=0.1 would hold out others",
    ]  # fmt: skip
    assert len(lines) == len(wanted) and all(line.startswith(start) for line, start in zip(lines, wanted, strict=True)), lines
