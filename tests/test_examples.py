"""The examples run."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_two_adapters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["two_adapters.py", "3"])
    runpy.run_path(str(EXAMPLES / "two_adapters.py"), run_name="__main__")
    assert "bare base" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the trl package (pip install trl)")
def test_trl_sft(tmp_path: Path) -> None:
    """In a process of its own, since the example lets `peft` mean weft's face for all of its process."""
    done = subprocess.run([sys.executable, str(EXAMPLES / "trl_sft.py"), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adapter_model.safetensors" in done.stdout
