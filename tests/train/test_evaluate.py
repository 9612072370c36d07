"""Answers by generation."""

from __future__ import annotations

import tiny_run

from weft.train import answers
from weft.train.evaluate import end_of_turn, left_padded, same


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


def test_outer_space_and_unicode_form_do_not_count():
    assert same(" caf\u0065\u0301\n", "caf\u00e9") and not same("a b", "ab")
