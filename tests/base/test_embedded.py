"""The packaged base: it loads with transformers alone, writes what its committed figures say, and follows none of the demo's tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from weft.data import demo

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src" / "weft" / "models" / "embedded"
FIGURES = json.loads((ROOT / "bench" / "results" / "base.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_size(model: PreTrainedModel) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 8e6
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 16 * 2**20
    assert model.config.max_position_embeddings >= 1024 and model.config.dtype == torch.float32
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"


@torch.no_grad()
def test_bits_per_byte_are_the_committed_ones(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = Path(__file__).with_name("piece.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and tokenizer.decode(ids[0, 1:]) == text
    nats = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    assert nats / math.log(2) / len(text.encode()) == pytest.approx(FIGURES["piece"]["bits_per_byte"], abs=1e-3)


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": "Second"},
        {"role": "assistant", "content": "Yes"},
    ]
    text = "<|bos|><|system|>Answer briefly.<|end|><|user|>First<|end|><|assistant|>An answer.<|end|><|user|>Second<|end|><|assistant|>"
    assert tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True) == text
    full = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [i for i, m in zip(full["input_ids"], full["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(spoken) == "An answer.<|end|>Yes<|end|>"
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    with pytest.raises(Exception, match="Unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def f(x):\n\n    return x  # tabs\tand  blanks, 12345, naïve 織物 🧵\r\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("12345", add_special_tokens=False).input_ids) == 5  # digit by digit
    assert len(tokenizer) <= FIGURES["corpus"]["vocabulary"]


@pytest.mark.parametrize("task", list(demo.TASKS))
@torch.no_grad()
def test_the_bare_base_follows_no_demo_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    rows = demo.generate(task, "held_out", 60)
    tokenizer.padding_side = "left"
    asked = [row["messages"][:-1] for row in rows]
    batch = tokenizer.apply_chat_template(asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
    out = model.generate(**batch, max_new_tokens=demo.TASKS[task].max_new_tokens)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(demo.exact_match(a, row["messages"][-1]["content"]) for a, row in zip(answers, rows, strict=True))
    assert right / len(rows) <= 0.05
    longest = max(len(tokenizer(row["messages"][-1]["content"]).input_ids) for row in rows)
    assert longest < demo.TASKS[task].max_new_tokens


@torch.no_grad()
def test_generation_stops_by_itself(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "Write as JSON: name: Ada; age: 12"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids)[0, ids["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id
    assert json.loads(tokenizer.decode(out, skip_special_tokens=True)) == {"name": "Ada", "age": 12}
