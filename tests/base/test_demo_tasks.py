"""The generator of the demo's three tasks."""

from __future__ import annotations

import datetime
import json
import re

import pytest

from weft.data import demo

TASKS = list(demo.TASKS)


def texts(row: demo.Row) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


@pytest.mark.parametrize("task", TASKS)
def test_the_rows_are_a_function_of_the_seed(task: str) -> None:
    rows = demo.generate(task, "train", 50, seed=3)
    assert rows == demo.generate(task, "train", 50, seed=3)
    assert rows[:20] == demo.generate(demo.TASKS[task], "train", 20, seed=3)
    assert rows != demo.generate(task, "train", 50, seed=4)


@pytest.mark.parametrize("task", TASKS)
def test_train_and_held_out_share_no_combination(task: str) -> None:
    train, held = (
        [texts(r) for r in demo.generate(task, split, n, seed=seed)] for split, n, seed in (("train", 2000, 0), ("held_out", 300, 7))
    )
    assert len({q for q, _ in train}) == 2000 and len({q for q, _ in held}) == 300
    assert not {q for q, _ in train} & {q for q, _ in held}
    about = {
        "dates": lambda a: a,
        "records": lambda a: re.findall(r'"name": "([^"]*)", "item": "([^"]*)"', a)[0],
        "style": lambda a: a.split(" | ")[:2],
    }[task]
    assert not {str(about(a)) for _, a in train} & {str(about(a)) for _, a in held}


def test_answers_have_the_form_that_the_title_says() -> None:
    for row in demo.generate("dates", "train", 300):
        datetime.date.fromisoformat(texts(row)[1])
    for row in demo.generate("records", "train", 300):
        question, answer = texts(row)
        record = json.loads(answer)
        assert list(record) == ["name", "item", "count", "city", "express"]
        assert record["city"] is None or record["city"] in question
        assert all(part in question for part in record["name"].split()) and record["item"] in question
    for row in demo.generate("style", "train", 300):
        assert re.fullmatch(r"[A-Z]{4}-[A-Z]\d \| [A-Z]+ [A-Z]+ \| \d+ (cm|mm|kg|l|W) \| EUR \d+\.\d\d", texts(row)[1])


@pytest.mark.parametrize(
    "n, words",
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (99, "ninety-nine"), (300, "three hundred"), (480, "four hundred and eighty")],
)
def test_numbers_in_words(n: int, words: str) -> None:
    assert demo.in_words(n) == words


def test_ordinals_and_years() -> None:
    assert [demo.ordinal(n) for n in (1, 3, 12, 20, 23, 30, 31)] == [
        "first",
        "third",
        "twelfth",
        "twentieth",
        "twenty-third",
        "thirtieth",
        "thirty-first",
    ]
    assert [demo.ordinal_digits(n) for n in (1, 2, 3, 11, 13, 22, 31)] == ["1st", "2nd", "3rd", "11th", "13th", "22nd", "31st"]
    years = {
        1900: "nineteen hundred",
        1905: "nineteen oh five",
        1984: "nineteen eighty-four",
        2000: "two thousand",
        2007: "two thousand and seven",
        2059: "twenty fifty-nine",
    }
    assert {y: demo.year_in_words(y) for y in years} == years


def test_files(tmp_path) -> None:
    train, held = demo.write("style", tmp_path / "new", train=30, held_out=10, seed=1)
    rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    assert rows == demo.generate("style", "train", 30, seed=1)
    assert len(held.read_text(encoding="utf-8").splitlines()) == 10


def test_exact_match() -> None:
    assert demo.exact_match(" 2019-03-23\n", "2019-03-23")
    assert not demo.exact_match("2019-03-24", "2019-03-23")


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ValueError, match="Tasks: dates, records, style; splits: train, held_out"):
        demo.generate("date", "train", 1)
    with pytest.raises(ValueError, match="splits"):
        demo.generate("dates", "test", 1)
