"""The examples run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_two_adapters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["two_adapters.py", "3"])
    runpy.run_path(str(EXAMPLES / "two_adapters.py"), run_name="__main__")
    assert "bare base" in capsys.readouterr().out
