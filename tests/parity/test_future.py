"""Files of a newer peft (or weft): a field that is not known here is named, has no effect, and is written back. For every kind of file."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import weft
from tests.conftest import jolt, llama
from tests.contract.test_contract import METHODS_TRIED
from tests.parity.test_fields import CONFIGS
from weft.adapters.files import CONFIG
from weft.adapters.formats import FORMATS, format_of
from weft.core import METHODS

# one of METHODS_TRIED for each form of file
KINDS = {kind: next(n for n, make in METHODS_TRIED.items() if type(make("llama")) is kind) for kind in METHODS.values()}
NEW: dict[str, Any] = {"zeta_of_2031": {"rate": 0.5, "where": ["q_proj"]}, "a_switch_of_2031": True, "peft_version": "9.9.9"}
SILENT = {"off_in_2031": False, "none_in_2031": None, "empty_in_2031": []}  # they ask for nothing
THEIRS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"]),
    "ADALORA": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["q_proj"]),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"]),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}


def _newer(folder: Path) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | NEW | SILENT))


def _there_and_back(base: nn.Module, folder: Path, ids: torch.Tensor, want: torch.Tensor) -> None:
    """Twice: what comes of the first loading is loaded again."""
    for turn in ("second", "third"):
        with pytest.warns(UserWarning, match="does not know") as told:
            model = weft.load(copy.deepcopy(base), folder)
        (said,) = [str(w.message) for w in told if "does not know" in str(w.message)]
        assert "zeta_of_2031={'rate': 0.5, 'where': ['q_proj']}" in said and "a_switch_of_2031=True" in said and CONFIG in said
        assert "peft_version" not in said and not any(name in said for name in SILENT)
        assert torch.allclose(model(ids).logits, want, atol=1e-5)
        folder = weft.save(model, folder.parent / turn)
        written = json.loads((folder / CONFIG).read_text())
        assert all(written[k] == v for k, v in NEW.items() if k != "peft_version") and not set(SILENT) & set(written)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_what_weft_wrote(kind: type[Any], ids: torch.Tensor, tmp_path: Path) -> None:
    base = llama()
    model = weft.adapt(copy.deepcopy(base), METHODS_TRIED[KINDS[kind]]("llama"))
    jolt(model)
    weft.save(model, tmp_path / "first")
    _newer(tmp_path / "first")
    _there_and_back(base, tmp_path / "first", ids, model(ids).logits)
    if kind not in FORMATS:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, that it does not know them either
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "third")
        logits = theirs(ids).logits[:, -ids.shape[1] :]
    assert torch.allclose(logits, model(ids).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_wrote(kind: str, ids: torch.Tensor, tmp_path: Path) -> None:
    base = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about models of this size
        theirs = peft.get_peft_model(copy.deepcopy(base), THEIRS[kind]()).eval()
        jolt(theirs)
        theirs.save_pretrained(tmp_path / "first")
        want = theirs(ids).logits[:, -ids.shape[1] :]
    _newer(tmp_path / "first")
    _there_and_back(base, tmp_path / "first", ids, want)


def test_no_kind_of_file_is_left_out() -> None:
    assert {format_of(kind).peft_type for kind in FORMATS} == set(THEIRS) == set(CONFIGS)
