"""peft's `ensure_weight_tying`: what is trained on an embedding and on the head that shares its weight loads, and goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import weft
from tests.compat.stories import IDS, fill, logits
from tests.conftest import gpt2, llama
from tests.parity.quiet import PEFTS_OWN
from weft.core import Replaced

pytestmark = [*PEFTS_OWN, pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but")]
CONFIGS: dict[str, dict[str, Any]] = {
    "whole": dict(modules_to_save=["embed_tokens"]), "by its head": dict(modules_to_save=["lm_head"]),
    "factors": dict(target_modules=["embed_tokens", "v_proj", "wte"]), "of the head alone": dict(target_modules=["lm_head"]),
    "dora": dict(target_modules=["embed_tokens", "wte", "q_proj"], use_dora=True),
    "pattern": dict(target_modules=r".*(embed_tokens|wte|q_proj)"),
    "rslora": dict(target_modules=["embed_tokens", "wte"], use_rslora=True, lora_alpha=3),
}  # fmt: skip


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("make", [tied, gpt2])
def test_files_of_an_embedding_and_its_head(make: Any, kind: str, tmp_path: Path) -> None:
    given = dict(target_modules=["v_proj", "c_attn"], ensure_weight_tying=True, fan_in_fan_out=make is gpt2) | CONFIGS[kind]
    if kind == "whole" and make is gpt2:
        given["modules_to_save"] = ["wte"]  # which peft does not know for an embedding: there the head stays the base's
    theirs = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, **given)).eval()
    fill(theirs)
    want = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = weft.load(make(), tmp_path / "theirs")
    assert torch.allclose(run(mine), want, atol=1e-5)
    weft.save(mine, tmp_path / "mine")
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "mine").eval()), want, atol=1e-5)
    assert torch.allclose(run(weft.load(make(), tmp_path / "mine")), want, atol=1e-5)
    head, embedding = mine.get_output_embeddings(), mine.get_input_embeddings()
    whole = isinstance(weft.adapters.attached(mine, "default").get("lm_head"), Replaced)
    assert whole == ("modules_to_save" in given and given["modules_to_save"] != ["wte"])
    if not whole:
        with pytest.raises(weft.WeftError, match="untie=True"):
            weft.merge(mine)
    assert torch.allclose(run(weft.merge(mine, untie=not whole)), want, atol=1e-4)
    assert (head.weight is embedding.weight) == whole
