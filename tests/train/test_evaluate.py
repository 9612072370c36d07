"""Answers by generation."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_run
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from weft.core import WeftError
from weft.data import Example, Row
from weft.train import answers
from weft.train.evaluate import check_lengths, end_of_turn, left_padded, same


def test_left_padding():
    ids, mask = left_padded([[1, 2, 3], [4]], 0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_end_of_turn_is_what_the_template_writes():
    tokenizer = tiny_run.tokenizer()
    assert end_of_turn(tokenizer) == [tokenizer.convert_tokens_to_ids("<|end|>")]
    tokenizer.eos_token = "<|eos|>"
    assert end_of_turn(tokenizer) == [tokenizer.convert_tokens_to_ids(t) for t in ("<|eos|>", "<|end|>")]


def test_batched_answers_are_those_of_one_by_one():
    """Greedy, left padded: a chat's answer does not depend on its neighbours."""

    model, tokenizer = tiny_run.model(tied=False), tiny_run.tokenizer()
    chats = [[{"role": "user", "content": "ab" * n}] for n in (1, 7, 3, 12, 2)]
    together = answers(model, tokenizer, chats, max_new_tokens=6, batch=3)
    alone = [answers(model, tokenizer, [chat], max_new_tokens=6)[0] for chat in chats]
    assert together == alone and any(together)


def gpt2() -> GPT2LMHeadModel:
    """A model of 32 places, each with a vector."""
    torch.manual_seed(0)
    shape = {"vocab_size": 262, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=260, eos_token_id=261)).eval()


def examples(*lengths: int) -> tuple[list[Example], list[Row]]:
    made = [Example(np.full(n, 97, np.int32), np.ones(n, bool), i) for i, n in enumerate(lengths)]
    return made, [Row(f"rows.jsonl:{i + 1}", "text") for i in range(len(lengths))]


def test_rows_that_a_model_has_no_places_for_are_refused_by_name():
    """Without that GPT-2 fails in the middle of a step, on a card with all that runs there."""
    made, rows = examples(8, 40, 33)
    with pytest.raises(WeftError, match=r"2 rows are .* 32 tokens .* has places for: rows.jsonl:2 has 40 .*data.max_length 32 "):
        check_lengths(gpt2(), made, rows, 64)
    assert check_lengths(gpt2(), *examples(8, 32), 64) is None
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 1, "ffn_dim": 64, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=262, max_position_embeddings=32, **shape))
    with pytest.raises(WeftError, match="has places for"):
        check_lengths(model, made, rows, 64)


def test_rows_longer_than_a_model_was_made_for_are_told():
    """Rotary positions go on beyond them."""
    assert check_lengths(tiny_run.model(), *examples(8, 256), 512) is None
    said = check_lengths(tiny_run.model(), *examples(8, 257), 512)
    assert said is not None and "1 row is longer than the 256 tokens that this model was made for: rows.jsonl:2 has 257" in said
    with pytest.raises(WeftError, match=r"longer than a batch, which holds 300 tokens: rows.jsonl:1 has 400 tokens. data.max_length 256"):
        check_lengths(tiny_run.model(), *examples(400), 300)
    assert check_lengths(nn.Linear(2, 2), *examples(400), 400) is None


def test_answers_end_where_the_places_do():
    (answer,) = answers(gpt2(), tiny_run.tokenizer(), [[{"role": "user", "content": "a" * 24}]], max_new_tokens=64)
    assert isinstance(answer, str)


def test_outer_space_and_unicode_form_do_not_count():
    assert same(" caf\u0065\u0301\n", "caf\u00e9") and not same("a b", "ab")
