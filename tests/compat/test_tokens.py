"""Trained tokens through the face of peft, where it goes beyond peft or says no."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import weft
import weft.compat.peft as face
from tests.compat.stories import logits
from tests.compat.stories_tokens import put_all, tied
from tests.conftest import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def tokens(*ids: int, **more: Any) -> Any:
    return face.TrainableTokensConfig(token_indices=list(ids), task_type="CAUSAL_LM", **more)


def lora(*ids: int, **more: Any) -> Any:
    given = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | more
    return face.LoraConfig(trainable_token_indices=list(ids) or None, **given)


@pytest.mark.parametrize("config", [tokens(9, 4), lora(9, 4)], ids=["alone", "lora"])
@pytest.mark.parametrize("build", [llama, tied], ids=["untied", "tied"])
@pytest.mark.filterwarnings("ignore")
def test_each_reads_what_the_other_wrote(config: Any, build: Any, tmp_path: Path) -> None:
    made = face.get_peft_model(build(), config).eval()
    put_all(made)
    made.save_pretrained(tmp_path / "face")
    weft.save(weft.load(build(), tmp_path / "face"), tmp_path / "weft")
    peft.PeftModel.from_pretrained(build(), tmp_path / "weft").save_pretrained(tmp_path / "peft")
    want = logits(made)
    for folder in ("face", "weft", "peft"):
        for package in (peft, face):
            assert torch.allclose(logits(package.PeftModel.from_pretrained(build(), tmp_path / folder)), want, atol=1e-6)
        assert torch.allclose(logits(weft.load(build(), tmp_path / folder)), want, atol=1e-6)


def test_two_adapters_share_a_tied_head() -> None:
    made = face.get_peft_model(tied(), tokens(9, 4)).eval()
    made.add_adapter("two", tokens(4, 20))
    put_all(made)
    alone = {}
    for name in ("default", "two"):
        made.set_adapter(name)
        alone[name] = logits(made)
    mixed = logits(made, adapter_names=["two", "__base__", "default", "two"])
    assert torch.allclose(mixed[0], alone["two"][0], atol=1e-5) and torch.allclose(mixed[2], alone["default"][2], atol=1e-5)
    assert torch.allclose(mixed[1], logits(tied())[1], atol=1e-5)
    made.base_model.set_adapter(["default", "two"])
    both, inner = logits(made), made.base_model.model
    assert not torch.allclose(both, alone["two"], atol=1e-3)
    made.merge_adapter()
    embedding, head = inner.model.embed_tokens.get_base_layer(), inner.lm_head.get_base_layer()
    assert torch.allclose(logits(made), both, atol=1e-5) and head.weight is embedding.weight
    made.unmerge_adapter()
    assert torch.equal(logits(made), both) and head.weight is embedding.weight
    assert weft.summary(made).adapters[0].layers == "embed_tokens (Embedding), lm_head (Linear)"


def test_an_adapter_without_tokens_beside_one_with(tmp_path: Path) -> None:
    made = face.get_peft_model(tied(), lora(9, 4)).eval()
    made.add_adapter("c", lora(target_modules=["v_proj"]))
    put_all(made)
    made.set_adapter("c")
    alone = logits(made)
    mixed = logits(made, adapter_names=["c", "default", "c", "__base__"])
    assert torch.allclose(mixed[0], alone[0], atol=1e-5) and not torch.allclose(mixed[1], alone[1], atol=1e-3)
    made.save_pretrained(tmp_path)
    assert torch.allclose(logits(face.PeftModel.from_pretrained(tied(), tmp_path / "c")), alone, atol=1e-6)


@pytest.mark.parametrize("config", [tokens(9, 4), lora(9, 4)], ids=["alone", "lora"])
def test_copies_and_pickles_stay_tied(config: Any) -> None:
    made = face.get_peft_model(tied(), copy.deepcopy(config)).eval()
    put_all(made)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for twin in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(logits(twin), logits(made))
        (rows,) = (p for n, p in twin.named_parameters() if "_delta" in n)
        rows.data += 1
        front: Any = twin.base_model.model.lm_head
        front = getattr(front, "token_adapter", front)
        assert front.trainable_tokens_delta["default"] is rows and front.slot["default"].E is rows
        front.trainable_tokens_delta["default"] = torch.nn.Parameter(rows + 1)
        held = twin.base_model.model.model.embed_tokens
        assert torch.equal(getattr(held, "token_adapter", held).slot["default"].E, rows + 1), "who writes one writes both"
        assert not torch.allclose(logits(twin), logits(made), atol=1e-3)


def test_without_a_wrapper() -> None:
    model = face.inject_adapter_in_model(lora(9, 4), tied(), adapter_name="x").eval()
    put_all(model)
    state = face.get_peft_model_state_dict(model, adapter_name="x")
    assert [k for k in state if "token" in k] == ["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    before = logits(model)
    face.set_peft_model_state_dict(model, {k: v + 1 if "token" in k else v for k, v in state.items()}, adapter_name="x")
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_training_moves_the_rows_and_nothing_else() -> None:
    made = face.get_peft_model(tied(), lora(9, 4, init_lora_weights=False)).train()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
    ids = torch.arange(3, 15).view(2, 6)
    made(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    moved = {k for k, v in made.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(".lora_" in k or "trainable_tokens_delta" in k for k in moved)
    assert {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default",
            "base_model.model.lm_head.token_adapter.trainable_tokens_delta.default"} <= moved  # fmt: skip


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"lm_head .or the embedding that it is tied to. is adapted as a layer, too"):
        face.get_peft_model(tied(), lora(9, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="has no token 96"):
        face.get_peft_model(llama(), lora(96))
    made = face.get_peft_model(tied(), lora(9, 4)).eval()
    names, out = list(made.state_dict()), logits(made)
    with pytest.raises(ValueError, match="another adapter trains its tokens"):
        made.add_adapter("b", lora(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="does not support trained tokens"):
        made.add_weighted_adapter(["default"], [1.0], "w")
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping does not work with trained tokens"):
        face.utils.hotswap.hotswap_adapter(made, str(tmp_path), "default")
    assert list(made.state_dict()) == names and torch.equal(logits(made), out) and list(made.peft_config) == ["default"]
