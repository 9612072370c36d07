"""peft's activated LoRA: files both ways, the same logits, gradients and texts; what peft cannot do is done here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import weft
from tests.conftest import gpt2, jolt, llama
from tests.contract.test_alora import CALL, rows
from tests.contract.test_prompts import GREEDY, gemma2
from weft.adapters import trainable

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own, about models of this size and this version of transformers
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": dict(r=4, lora_alpha=6), "bias": dict(r=3, lora_bias=True),
    "rslora": dict(r=4, use_rslora=True, rank_pattern={"q_proj|c_attn": 2}),
}  # fmt: skip


def theirs(base: Any, kind: str = "plain", **more: Any) -> Any:
    targets = ["c_attn", "c_fc"] if hasattr(base, "transformer") else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, alora_invocation_tokens=list(CALL), fan_in_fan_out="c_attn" in targets,
        **CONFIGS[kind] | more,
    )  # fmt: skip
    made = peft.get_peft_model(base, config).eval()
    jolt(made, size=0.2)
    return made


def close(a: Tensor, b: Tensor, within: float = 1e-6) -> bool:
    return bool((a - b).norm() <= within * b.norm())


def both(make: Any, folder: Path, kind: str = "plain") -> tuple[Any, Any]:
    other = theirs(make(), kind)
    other.save_pretrained(folder)
    return weft.load(make(), folder), other


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("make", [llama, gpt2, gemma2])
def test_files_both_ways_logits_and_gradients(make: Any, kind: str, tmp_path: Path) -> None:
    mine, other = both(make, tmp_path / "theirs", kind)
    ids, mask = rows()
    weft.save(mine, tmp_path / "mine")
    written, read = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("mine", "theirs"))
    assert written["alora_invocation_tokens"] == read["alora_invocation_tokens"] == list(CALL) and set(written) <= set(read)
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "mine").eval()
    at = mask.bool()
    want = other(input_ids=ids, attention_mask=mask).logits[at]
    assert close(mine(ids, attention_mask=mask).logits[at], want) and close(back(input_ids=ids, attention_mask=mask).logits[at], want)
    assert not close(make()(ids, attention_mask=mask).logits[at], want, 1e-3)

    for model in (mine, other):
        for p in model.parameters():
            p.grad = None
        out = model(input_ids=ids, attention_mask=mask).logits
        out[at].square().mean().backward()
    grads = {n.replace(".weight", "").replace("base_model.model.", ""): p.grad for n, p in other.named_parameters() if p.grad is not None}
    own = trainable(mine, "default")
    assert len(own) == len(grads)
    for name, p in own.items():
        path, _, end = name.rpartition(".")
        key = {"A": "lora_A.default", "B": "lora_B.default", "b": "lora_B.default.bias"}[end]
        assert close(p.grad, grads[f"{path}.{key}"], 1e-5), name


@pytest.mark.parametrize("make", [llama, gpt2, gemma2])
def test_the_same_text_is_written(make: Any, tmp_path: Path) -> None:
    mine, other = both(make, tmp_path)
    ids, mask = rows()
    with torch.no_grad():
        base = make().generate(ids, attention_mask=mask, **GREEDY)
        made = mine.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(made, other.generate(input_ids=ids, attention_mask=mask, **GREEDY)) and not torch.equal(made, base)


def test_rows_with_different_ones(tmp_path: Path) -> None:
    other = theirs(llama())
    late = dict(r=3, target_modules=["up_proj", "q_proj"], alora_invocation_tokens=CALL[1:])
    for name, config in (("late", late), ("plain", dict(r=2, target_modules=["k_proj"]))):
        other.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", **config))
        other.set_adapter(name)
        jolt(other, size=0.2, seed=len(name))
    other.save_pretrained(tmp_path)
    mine = llama()
    for name in ("default", "late", "plain"):
        weft.load(mine, tmp_path / ("" if name == "default" else name), name)
    names = ["late", None, "plain", "default"]
    ids, mask = (t[[0, 1, 2, 2]] for t in rows())
    asked = ["__base__" if n is None else n for n in names]
    with torch.no_grad(), weft.rows(mine, names):
        want = other(input_ids=ids, attention_mask=mask, adapter_names=asked).logits
        assert close(mine(ids, attention_mask=mask).logits[mask.bool()], want[mask.bool()])
        assert torch.equal(
            mine.generate(ids, attention_mask=mask, **GREEDY),
            other.generate(input_ids=ids, attention_mask=mask, adapter_names=asked, **GREEDY),
        )


def test_what_peft_cannot(tmp_path: Path) -> None:
    """Beams are refused there, a text written without a cache moves its beginning, and a call that goes on from a cache forgets it."""
    mine, other = both(llama, tmp_path)
    ids, mask = rows()
    how = dict(attention_mask=mask, **GREEDY)
    with torch.no_grad():
        with pytest.raises(ValueError, match="Beam search"):
            other.generate(input_ids=ids, num_beams=2, **how)
        assert torch.equal(mine.generate(ids, num_beams=2, **how), mine.generate(ids, num_beams=2, use_cache=False, **how))
        cached, anew = (other.generate(input_ids=ids, use_cache=c, **how) for c in (True, False))
        assert not torch.equal(cached, anew) and torch.equal(mine.generate(ids, use_cache=False, **how), cached)
        whole = mine(ids).logits[:, -1:]
        for model, same in ((mine, True), (other, False)):
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            assert close(model(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits, whole, 1e-5) == same


def test_with_dora_there_is_no_such_thing(tmp_path: Path) -> None:
    theirs(llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(weft.WeftError, match="use_dora=True with alora_invocation_tokens"):
        weft.load(llama(), tmp_path)
