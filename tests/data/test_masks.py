"""Exactly the answers bear loss, and the report tells what became of the rows."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.data.tiny import CHATML, MARKED, NO_END, STRICT, THINKS, tokenizer
from weft.core import WeftError
from weft.data import DataConfig, Row, prepare, question, split_rows


def config(**kwargs):
    return DataConfig(train="unused.jsonl", **kwargs)


def chat(*texts, where="a.jsonl:1", system=None, format="messages"):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Row(where=where, format=format, messages=tuple(messages), source="a.jsonl", kind="JSONL")


def text(content, **kwargs):
    return Row(where="b.txt", format="text", text=content, source="b.txt", kind="text", **kwargs)


def prep(rows, tok, **kwargs):
    return prepare(rows, tok, config(**kwargs), progress=False)


def learned(example, tok):
    """The stretches that bear loss, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.bears, [False]]).astype(int)))
    return [tok.decode(example.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_answer_and_its_end_bear_loss(template):
    tok = tokenizer(template)
    rows = [chat("what is the date?", "the third day", "and the cat?", "sat", system="be brief"), chat("a", "b c", "trailing question")]
    one, two = prep(rows, tok).examples
    assert learned(one, tok) == ["the third day<|im_end|>", "sat<|im_end|>"]
    assert learned(two, tok) == ["b c<|im_end|>"]
    assert one.bears[-1] and two.bears[-1]  # nothing is computed after the last token that bears loss
    whole = tok.apply_chat_template(list(rows[0].messages), tokenize=True, return_dict=True)["input_ids"]
    assert one.ids.tolist() == whole[: len(one)]


words = st.text(alphabet="abc the,\n?<|é", min_size=1, max_size=30).map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
def test_marks_and_prefixes_agree(turns, only_last):
    """Two ways to the same mask: the template's own marks, and rendering prefixes."""
    row, how = chat(*(t for turn in turns for t in turn)), "last" if only_last else "answer"
    made = [prep([row], tokenizer(template), loss_on=how).examples[0] for template in (CHATML, MARKED)]
    assert np.array_equal(made[0].ids, made[1].ids) and np.array_equal(made[0].bears, made[1].bears)
    want = [f"{answer}<|im_end|>" for _, answer in turns]
    assert learned(made[0], tokenizer(CHATML)) == (want[-1:] if only_last else want)


def test_loss_on_everything():
    tok = tokenizer(CHATML)
    (example,) = prep([chat("a", "b")], tok, loss_on="all").examples
    assert not example.bears[0] and example.bears[1:].all() and example.ids.dtype == np.int32


def test_a_template_without_end_of_turn_gets_the_end_of_text():
    tok = tokenizer(NO_END)
    (example,) = prep([chat("hi", "yes")], tok).examples
    assert learned(example, tok) == ["yes\n<|end|>"]


@pytest.mark.parametrize("begin", [False, True])
def test_without_a_template_prompt_and_completion_stand_as_written(begin):
    tok = tokenizer(begin=begin)
    rows = [chat("the cat ", "sat", format="prompt"), chat("add\n\n2 2", "4", format="alpaca")]
    one, two = prep(rows, tok).examples
    start = "<|begin|>" if begin else ""
    assert tok.decode(one.ids) == f"{start}the cat sat<|end|>" and learned(one, tok) == ["sat<|end|>"]
    assert tok.decode(two.ids) == f"{start}### Instruction:\nadd\n\n2 2\n\n### Response:\n4<|end|>" and learned(two, tok) == ["4<|end|>"]


def test_template_plain_leaves_the_chat_template_out():
    tok = tokenizer(CHATML)
    (example,) = prep([chat("the cat ", "sat", format="prompt")], tok, template="plain").examples
    assert tok.decode(example.ids) == "the cat sat<|end|>"
    (example,) = prep([chat("the cat ", "sat", format="prompt")], tok).examples
    assert tok.decode(example.ids).startswith("<|im_start|>user\nthe cat <|im_end|>")


@pytest.mark.parametrize("begin", [False, True])
def test_text_bears_loss_everywhere(begin):
    tok = tokenizer(CHATML, begin=begin)
    (example,) = prep([text("the cat sat")], tok).examples
    assert not example.bears[0] and example.bears[1:].all()
    assert tok.decode(example.ids) == ("<|begin|>" if begin else "") + "the cat sat<|end|>"


@pytest.mark.parametrize(("template", "format"), [(CHATML, "messages"), (MARKED, "messages"), (None, "prompt"), (None, "alpaca")])
def test_generation_starts_from_what_training_saw_before_the_answer(template, format):
    tok = tokenizer(template, begin=True)
    row = chat("what is the date?", "the third day", format=format)
    (example,) = prep([row], tok).examples
    ids, answer = question(row, tok, config())
    assert answer == "the third day"
    assert ids == example.ids[: int(np.flatnonzero(example.bears)[0])].tolist()
    with pytest.raises(WeftError, match="the row has no answer"):
        question(chat("only a question", format=format), tok, config())


# ---------------------------------------------------------------------------------------------------- cutting, counting


def test_rows_are_cut_at_the_right_and_counted():
    tok = tokenizer()
    rows = [
        chat("the cat", " sat", format="prompt", where="a:1"),
        chat("the cat " * 30, "sat", format="prompt", where="a:2"),  # all of the answer lies beyond
        chat("the cat", " on the mat" * 30, format="prompt", where="a:3"),  # part of it does
        chat("the cat", "  ", format="prompt", where="a:4"),  # no answer
        chat(where="a:5"),
        text(" \n"),
    ]
    prepared = prep(rows[:4] + rows[5:], tok, max_length=20)
    report = prepared.report
    assert [example.row for example in prepared.examples] == [0, 2] and len(prepared.examples[1]) == 20
    assert (report.rows, report.examples, report.cut, report.empty, report.shortened) == (5, 2, 1, 2, 1)
    assert report.tokens == sum(map(len, prepared.examples)) and report.learned == sum(int(e.bears.sum()) for e in prepared.examples)
    assert prep([rows[4], chat("a", "b")], tokenizer(CHATML)).report.empty == 1


def test_a_document_is_split_and_loses_nothing():
    tok, content = tokenizer(), "the cat sat on the mat, and the dog ran\n" * 40
    prepared = prep([text(content, split=True)], tok, max_length=64)
    assert "".join(tok.decode(e.ids) for e in prepared.examples) == content + "<|end|>"
    assert prepared.report.rows == 1 and prepared.report.examples == len(prepared.examples) > 3
    assert "1, in" in str(prepared.report)


def test_all_answers_cut_away_says_what_would_do():
    tok = tokenizer()
    rows = [chat("the cat " * n, "sat", format="prompt") for n in (40, 30)] + [chat("a", "", format="prompt")]
    with pytest.raises(WeftError) as caught:
        prep(rows, tok, max_length=8)
    want = "data.max_length 8 cuts every answer away: all 2 rows have a prompt of 8 tokens or more (1 more rows are empty)"
    assert want in str(caught.value)
    some, whole = map(int, re.findall(r"max_length (\d+); (\d+) keeps", str(caught.value))[0])
    assert len(prep(rows, tok, max_length=some).examples) == 1
    with pytest.raises(WeftError):
        prep(rows, tok, max_length=some - 1)
    report = prep(rows, tok, max_length=whole).report
    assert (report.examples, report.shortened) == (2, 0) and prep(rows, tok, max_length=whole - 1).report.shortened == 1


def test_the_report_shows_a_row_with_its_mask():
    report = prep([chat("what is the date?", "the third day")], tokenizer(CHATML)).report
    plain = str(report)
    assert "<|im_start|>assistant\n⟦the third day<|im_end|>⟧" in plain
    for part in ("messages (JSONL)", "a.jsonl", "rows       1", "left out   none", f"{report.learned:,} tokens, {report.share:.1%}"):
        assert part in plain, plain
    console = Console(width=100, force_terminal=True, color_system="truecolor")
    with console.capture() as shown:
        console.print(report)
    assert "\x1b[1;32mthe third day<|im_end|>" in shown.get()


def test_holding_out_is_by_seed_alone():
    rows = [chat("a", str(i), where=f"a:{i}") for i in range(50)]
    train, held = split_rows(rows, 0.1, seed=3)
    assert len(held) == 5 and sorted(r.where for r in train + held) == sorted(r.where for r in rows)
    assert (train, held) == split_rows(rows, 0.1, seed=3) and held != split_rows(rows, 0.1, seed=4)[1]
    assert len(split_rows(rows[:2], 0.01, seed=0)[1]) == 1
    with pytest.raises(WeftError, match="at least 2 rows"):
        split_rows(rows[:1], 0.5, seed=0)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("rows", "template", "kwargs", "want"),
    [
        ([chat("a", "b")], None, {}, "a.jsonl:1: the row is a chat, but the tokenizer has no chat template"),
        ([chat("a", "b")], CHATML, {"template": "plain"}, "a.jsonl:1: the row is a chat, but data.template is 'plain'"),
        ([chat("a", "b")], None, {"template": "chat"}, "data.template is 'chat', but the tokenizer has no chat template"),
        ([chat("a", "b", system="s")], STRICT, {}, "a.jsonl:1: the chat template says: System role not supported"),
        ([chat("a", "b", "c", "d")], THINKS, {}, "The template writes earlier turns differently"),
        ([chat("a", "\n b")], CHATML, {}, "merge with the prompt's last token: strip white space"),
        ([chat("a", "")], CHATML, {}, "nothing to learn: all 1 rows are empty (no answer, or a blank one), the first at a.jsonl:1"),
        ([], CHATML, {}, "there are no rows to train on"),
    ],
)
def test_rows_that_cannot_be_used(rows, template, kwargs, want):
    with pytest.raises(WeftError) as caught:
        prep(rows, tokenizer(template), **kwargs)
    assert want in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_can_still_teach_the_last():
    tok = tokenizer(THINKS)
    row = chat("a", "b", "c", "d")
    (example,) = prep([row], tok, loss_on="last").examples
    assert learned(example, tok) == ["d<|im_end|>"]
    assert prep([row], tok, loss_on="all").examples[0].bears[1:].all()


def test_a_config_says_what_is_wrong_with_it():
    with pytest.raises(WeftError, match="eval_split is a share of the rows"):
        config(eval_split=5)
    with pytest.raises(WeftError, match="max_length is 1"):
        config(max_length=1)
    with pytest.raises(WeftError, match=r"eval_split=0.1 would hold out others: set one of the two\ndata.max_length is 1"):
        config(eval="held.jsonl", eval_split=0.1, max_length=1)
    assert config(eval="held.jsonl", eval_split=0).eval_split == 0
