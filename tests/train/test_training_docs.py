"""The examples in docs/training.md run, and print what stands there."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from weft.train import load_recipe

DOC = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)


def test_recipe_in_the_docs_is_one():
    (text,) = blocks("yaml")
    assert load_recipe(yaml.safe_load(text)).train.patience == 3


def test_python_in_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for block in blocks("python"):
        exec(compile(block, "training.md", "exec"), space)
    said = capsys.readouterr().out
    assert said.startswith(blocks("text")[0])
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "metrics.jsonl", "recipe.yaml", "run.json"]
    assert f"4 True {files}" in said
