"""`fit` with what stands in front of the input: packed and padded runs learn, save, answer and go on alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

import weft
from weft.adapters import trainable


@pytest.mark.parametrize("method", ["PrefixTuning", "PromptTuning", "PTuning"])
@pytest.mark.parametrize("packing", [True, False])
def test_prompts_are_trained_by_fit(method: str, packing: bool, tmp_path: Path) -> None:
    more: Any = dict(method=method, data__packing=packing, train__lr=3e-2, train__steps=30)
    model = tiny_run.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = tiny_run.recipe(tmp_path, eval__exact_match=True, eval__max_new_tokens=4, **more)
    result = weft.fit(model, recipe, tokenizer=tiny_run.tokenizer())
    first = next(line for line in result.history if "eval_loss" in line)
    assert result.eval_loss is not None and result.eval_loss < 0.95 * first["eval_loss"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)
    again = weft.load(tiny_run.model(), result.adapter)
    assert all(torch.equal(a, b) for a, b in zip(trainable(again, "default").values(), trainable(model, "default").values(), strict=True))


@pytest.mark.parametrize("method", ["PrefixTuning", "PTuning"])
def test_packing_changes_nothing_that_is_evaluated(method: str, tmp_path: Path) -> None:
    losses = []
    for packing in (True, False):
        recipe = tiny_run.recipe(tmp_path, method=method, data__packing=packing, train__steps=1, output=str(tmp_path / str(packing)))
        history = weft.fit(tiny_run.model(), recipe, tokenizer=tiny_run.tokenizer()).history
        losses.append(next(line for line in history if "eval_loss" in line)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
