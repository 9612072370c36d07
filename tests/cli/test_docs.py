"""docs/commands.md names every command, and only flags that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from weft.cli.completion import flags
from weft.cli.main import COMMANDS

DOC = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\$ (weft .*)$", DOC, re.M)


def test_every_command_has_a_section() -> None:
    assert set(re.findall(r"^## weft (\w+)$", DOC, re.M)) >= set(COMMANDS)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_use_flags_that_there_are(example: str) -> None:
    command, *words = shlex.split(example.partition(">")[0])[1:]
    known = {flag for flag, _, _ in flags(command)}
    assert {w.partition("=")[0] for w in words if w.startswith("-")} <= known
