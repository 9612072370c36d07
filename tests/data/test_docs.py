"""The examples in docs/data.md run, and print what stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import llama
from tests.data.tiny import tokenizer

DOC = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"tokenizer": tokenizer(), "model": llama(vocab_size=400)}
    for code in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S):
        exec(compile(code, str(DOC), "exec"), names)
    printed = capsys.readouterr().out
    assert "prompt train.jsonl:1\n" in printed and "packed, " in printed
    shown = re.search(r"```text\n(.*?)```", DOC.read_text(), re.S)[1]
    assert shown in printed, printed
    assert float(names["loss"].detach()) == pytest.approx(5.99, abs=0.2)  # about log(400): the model knows nothing
