"""peft's prompt methods: files both ways, the network behind a prompt, going on with training; what peft cannot do is done here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import weft
from tests.conftest import gpt2, llama
from tests.contract.test_prompts import GREEDY, bart, gemma2, t5, tokens
from weft.adapters import trainable

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own, about models of this size and this version of transformers
CONFIGS: dict[str, Callable[..., Any]] = {
    "prompt": lambda **k: peft.PromptTuningConfig(num_virtual_tokens=3, **k),
    "prefix": lambda **k: peft.PrefixTuningConfig(num_virtual_tokens=3, **k),
    "projected": lambda **k: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, **k),
    "mlp": lambda **k: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **k),
    "lstm": lambda **k: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **k),
}
OURS: dict[str, weft.Method] = {
    "prompt": weft.PromptTuning(tokens=3), "prefix": weft.PrefixTuning(tokens=3),
    "projected": weft.PrefixTuning(tokens=3, projection=True, hidden=8), "mlp": weft.PTuning(tokens=3, hidden=8),
    "lstm": weft.PTuning(tokens=3, hidden=8, encoder="lstm"),
}  # fmt: skip
NETWORK = {  # ours -> peft's, within its prompt encoder
    "E": "embedding.weight", "W1": "transform.0.weight", "b1": "transform.0.bias", "W2": "transform.2.weight", "b2": "transform.2.bias",
}  # fmt: skip


def logits(model: Any) -> Tensor:
    """Of the row's own tokens; the second row is shorter."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    if getattr(model.config, "is_encoder_decoder", False):
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :5]).logits
    return model(input_ids=ids, attention_mask=mask).logits[:, -9:] * mask[:, :, None]


def close(a: Tensor, b: Tensor, within: float = 1e-6) -> bool:
    return bool((a - b).norm() <= within * b.norm())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("make", [llama, gpt2, gemma2, t5, bart])
def test_files_both_ways_with_and_without_the_network(make: Any, kind: str, tmp_path: Path) -> None:
    task = "SEQ_2_SEQ_LM" if make in (t5, bart) else "CAUSAL_LM"
    theirs = peft.get_peft_model(make(), CONFIGS[kind](task_type=task)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    want = logits(theirs)
    mine = weft.load(make(), tmp_path / "theirs")
    assert close(logits(mine), want)
    assert list(trainable(mine, "default")) == [".P"], "peft leaves the network out: the vectors themselves go on"
    own = weft.adapt(make(), OURS[kind], name="own")
    weft.save(own, tmp_path / "own", name="own")
    assert close(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "own").eval()), logits(own))
    again = weft.load(make(), tmp_path / "own")
    assert torch.equal(logits(again), logits(own))
    assert {k: v.shape for k, v in trainable(again, "default").items()} == {k: v.shape for k, v in trainable(own, "own").items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loaded_one_can_be_trained_on(kind: str, tmp_path: Path) -> None:
    """Which peft refuses (is_trainable=True)."""
    peft.get_peft_model(llama(), CONFIGS[kind](task_type="CAUSAL_LM")).save_pretrained(tmp_path / "theirs")
    weft.save(weft.adapt(llama(), OURS[kind]), tmp_path / "own")
    for place in ("theirs", "own"):
        model = weft.load(llama(), tmp_path / place)
        optimiser = torch.optim.AdamW(trainable(model, "default").values(), lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model(tokens(2, 9), labels=tokens(2, 9)).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0], place
        weft.save(model, tmp_path / f"{place}-more")
        assert torch.equal(logits(weft.load(llama(), tmp_path / f"{place}-more")), logits(model))


@pytest.mark.parametrize("kind", ["projected", "mlp", "lstm"])
def test_gradients_of_the_network_are_pefts(kind: str) -> None:
    theirs = peft.get_peft_model(llama(), CONFIGS[kind](task_type="CAUSAL_LM"))
    ours = weft.adapt(llama(), OURS[kind])
    encoder = dict(theirs.prompt_encoder["default"].named_parameters())
    names = {}
    for name in trainable(ours, "default"):
        own = name.removeprefix(".")
        names[name] = NETWORK.get(own, own)
        if own.startswith("mlp_"):
            names[name] = "mlp_head." + own.removeprefix("mlp_").replace("_", ".")
        elif own.startswith("lstm_"):
            names[name] = "lstm_head." + own.removeprefix("lstm_")
    with torch.no_grad():
        for name, p in trainable(ours, "default").items():
            p.copy_(encoder[names[name]])
    for model in (ours, theirs):
        logits(model).square().mean().backward()
    for name, p in trainable(ours, "default").items():
        assert close(p.grad, encoder[names[name]].grad, 1e-5), name


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generation_equals_pefts(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), CONFIGS[kind](task_type="CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path)
    mine = weft.load(llama(), tmp_path)
    ids = tokens(2, 7)
    for beams in (1, 3):
        more = dict(attention_mask=torch.ones_like(ids), num_beams=beams, **GREEDY)
        assert torch.equal(mine.generate(input_ids=ids, **more), theirs.generate(input_ids=ids, **more))


def test_what_a_file_asks_and_weft_does_not_compute_is_told(tmp_path: Path) -> None:
    weft.save(weft.adapt(llama(), weft.PromptTuning(tokens=3)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 4}))
    with pytest.raises(weft.WeftError, match=r"prompt_embeddings is \(3, 32\)"):
        weft.load(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": None}))
    with pytest.raises(weft.WeftError, match="num_virtual_tokens"):
        weft.load(llama(), tmp_path)
