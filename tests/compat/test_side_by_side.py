"""The same script with peft and with weft's face of it: what a user sees is the same."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import weft
import weft.compat.peft as face
from tests.compat.stories import STORIES, logits
from tests.compat.stories_alora import ALORA
from tests.compat.stories_experts import EXPERTS
from tests.compat.stories_more import MORE
from tests.compat.stories_ranks import RANKS
from tests.compat.stories_tied import TIED
from tests.compat.stories_tokens import TOKEN_STORIES
from tests.conftest import llama


def same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5), f"{where}: {(a.float() - b.float()).abs().max()}"
    elif isinstance(a, dict):
        assert list(a) == list(b) or set(a) == set(b), f"{where}: {sorted(map(str, set(a) ^ set(b)))}"
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple) and len(a) == len(b) and any(isinstance(x, torch.Tensor | dict | list | tuple) for x in a):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b), where
    else:
        assert a == b, f"{where}:\n  peft {a}\n  weft {b}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("story", STORIES)
def test_a_script_tells_the_same(story: str, tmp_path: Path) -> None:
    theirs = STORIES[story](peft, llama(), tmp_path / "peft")
    ours = STORIES[story](face, llama(), tmp_path / "weft")
    if "config" in theirs:
        for one in (theirs, ours):
            one["config"]["target_modules"] = str(one["config"]["target_modules"])
    same(theirs, ours, story)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("story", [*MORE, *EXPERTS, *RANKS, *TIED, *ALORA, *TOKEN_STORIES])
def test_so_do_other_methods_layers_and_tasks(story: str, tmp_path: Path) -> None:
    script = (MORE | EXPERTS | RANKS | TIED | ALORA | TOKEN_STORIES)[story]
    same(script(peft, tmp_path / "peft"), script(face, tmp_path / "weft"), story)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("story", ["trains_and_saves", "whole_modules", "several"])
def test_each_reads_what_the_other_wrote(story: str, tmp_path: Path) -> None:
    STORIES[story](face, llama(), tmp_path / "weft")
    STORIES[story](peft, llama(), tmp_path / "peft")
    read = [package.PeftModel.from_pretrained(llama(), tmp_path / folder) for package in (peft, face) for folder in ("weft", "peft")]
    for model in read[1:]:
        same(logits(read[0]), logits(model), story)
    assert not any(p.requires_grad for p in read[2].parameters())


@pytest.mark.filterwarnings("ignore")
def test_each_reads_the_ranks_that_the_other_left(tmp_path: Path) -> None:
    """AdaLoRA at the end of its budget, some layers with no rank at all; without memory too, where peft breaks off."""
    for package, folder in ((face, "weft"), (peft, "peft")):
        RANKS["adalora_to_the_end"](package, tmp_path / folder)
    for folder in ("weft", "peft"):
        read = [package.PeftModel.from_pretrained(llama(), tmp_path / folder / "end") for package in (peft, face)]
        thin = face.PeftModel.from_pretrained(llama(), tmp_path / folder / "end", low_cpu_mem_usage=True)
        plain = weft.load(llama(), tmp_path / folder / "end")
        ranks = [m.lora_E["default"].shape[0] for m in read[1].modules() if hasattr(m, "lora_E")]
        assert min(ranks) == 0 and sum(ranks) == len(ranks)
        for model in (read[1], thin, plain):
            same(logits(read[0]), logits(model), folder)


@pytest.mark.parametrize("name", sorted(n for n in peft.__all__ if n.endswith("Config") and n not in face.absent.NAMES))
def test_configurations_have_the_same_fields(name: str) -> None:
    def told(package: Any) -> list[tuple[str, str]]:
        return [
            (f.name, repr(f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default))
            for f in dataclasses.fields(getattr(package, name))
        ]

    assert told(face) == told(peft)


def test_every_name_of_peft_can_be_imported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [name for name in peft.__all__ if not hasattr(face, name)] == []
    with pytest.raises(ValueError, match="weft does not have this of peft"):
        face.XLoraConfig()
