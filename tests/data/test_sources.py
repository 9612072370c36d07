"""Reading files: every kind, every shape, and what is said about bad ones."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pyarrow
import pyarrow.parquet
import pytest

from weft.core import WeftError
from weft.data import load_rows

PROMPT = {"prompt": "two and two?", "completion": "four"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
GPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
ALPACA = {"instruction": "add", "input": "2 2", "output": "4"}
TEXT = {"text": "once upon a time"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def says(*parts, sources="a.jsonl", **kwargs):
    with pytest.raises(WeftError) as caught:
        load_rows(sources, **kwargs)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


def test_every_kind_of_file_gives_the_same_rows(folder):
    rows = [PROMPT, {"prompt": 'a "quoted", one\nover two lines', "completion": "ja, ö"}]
    lines(folder / "a.jsonl", *rows)
    (folder / "list.json").write_text(json.dumps(rows, indent=1))
    (folder / "lines.json").write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "no_suffix").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        with open(folder / name, "w", newline="") as f:
            writer = csv.DictWriter(f, ["prompt", "completion"], delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
    want = [row.messages for row in load_rows("a.jsonl")]
    assert want[0] == ({"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"})
    for name in ("list.json", "lines.json", "no_suffix", "a.parquet", "a.csv", "a.tsv"):
        assert [row.messages for row in load_rows(name)] == want, name


def test_where_names_file_and_line(folder):
    lines(folder / "a.jsonl", PROMPT, "", PROMPT)
    (folder / "b.json").write_text(json.dumps([TEXT, TEXT]))
    assert [row.where for row in load_rows(["a.jsonl", "b.json"])] == ["a.jsonl:1", "a.jsonl:3", "b.json[0]", "b.json[1]"]


def test_globs_are_sorted_and_lists_keep_their_order(folder):
    for name in ("b2", "b1", "a"):
        lines(folder / f"{name}.jsonl", {"text": name})
    assert [row.text for row in load_rows("b*.jsonl")] == ["b1", "b2"]
    assert [row.text for row in load_rows(["b2.jsonl", "a.jsonl", str(folder / "b1.jsonl")])] == ["b2", "a", "b1"]


def test_plain_text_is_one_document(folder):
    (folder / "book.txt").write_text("line one\nline two\n")
    (row,) = load_rows("book.txt")
    assert row.text == "line one\nline two\n" and row.split and row.format == "text"


@pytest.mark.parametrize(
    ("record", "shape", "roles"),
    [
        (CHAT, "messages", ["user", "assistant"]),
        (GPT | {"system": "be brief"}, "sharegpt", ["system", "user", "assistant"]),
        (PROMPT | {"id": 3, "text": "ignored"}, "prompt", ["user", "assistant"]),
        (ALPACA, "alpaca", ["user", "assistant"]),
        (ALPACA | {"input": None, "system": "s"}, "alpaca", ["system", "user", "assistant"]),
        (TEXT, "text", []),
    ],
)
def test_shapes_are_found_out(folder, record, shape, roles):
    lines(folder / "a.jsonl", record)
    (row,) = load_rows("a.jsonl")
    assert row.format == shape and [m["role"] for m in row.messages] == roles
    assert load_rows("a.jsonl", format=shape) == [row]


def test_an_alpaca_input_follows_its_instruction(folder):
    lines(folder / "a.jsonl", ALPACA, {"instruction": "add", "output": "4"})
    assert [row.messages[0]["content"] for row in load_rows("a.jsonl")] == ["add\n\n2 2", "add"]


def test_messages_keep_their_other_keys(folder):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    lines(folder / "a.jsonl", {"messages": [{"role": "user", "content": "hi", "name": "ann"}, call], "tools": [{"name": "f"}]})
    (row,) = load_rows("a.jsonl")
    assert row.messages[0]["name"] == "ann" and row.messages[1]["tool_calls"] and row.tools == [{"name": "f"}]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_missing_files_are_named_with_near_ones(folder):
    lines(folder / "train.jsonl", TEXT)
    text = says(
        "2 missing files:",
        f"data file not found: trian.jsonl (in {folder}); did you mean train.jsonl?",
        "there is no folder data",
        sources=["trian.jsonl", "data/x.jsonl"],
    )
    assert "hf:" not in text
    says('write "hf:tatsu-lab/alpaca"', sources="tatsu-lab/alpaca")


def test_patterns_folders_and_nothing(folder):
    (folder / "d").mkdir()
    lines(folder / "d" / "x.csv", "text", "a")
    says(f"no file matches *.jsonl (in {folder})", sources="*.jsonl")
    says("d is a folder; name its files, for example d/*.csv", sources="d")
    says("no data file is named", sources=[])


def test_empty_files(folder):
    lines(folder / "a.jsonl", "", "  ")
    (folder / "b.csv").write_text("text\n")
    (folder / "c.json").write_text("[]")
    says("a.jsonl is empty")
    says("b.csv has no rows", sources="b.csv")
    says("c.json has no rows", sources="c.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can read every file")
def test_files_that_cannot_be_read(folder):
    lines(folder / "a.jsonl", TEXT)
    (folder / "a.jsonl").chmod(0)
    says("a.jsonl cannot be read: Permission denied")


def test_blank_lines_before_the_first_row(folder):
    (folder / "a.jsonl").write_text("\n" * 5000 + json.dumps(TEXT))
    assert load_rows("a.jsonl")[0].where == "a.jsonl:5001"


def test_broken_lines_come_together(folder):
    lines(folder / "a.jsonl", TEXT, *['{"text": "never closed' + str(i) for i in range(7)], TEXT)
    text = says("7 broken lines, the first 5:", "a.jsonl:2: broken JSON", "the line begins {", "a.jsonl:6:")
    assert "a.jsonl:7" not in text
    lines(folder / "a.jsonl", TEXT, "{'text': 'python'}")
    assert says("a.jsonl:2: broken JSON, Expecting property name enclosed in double quotes at column 2").count("\n") == 0


def test_all_that_is_wrong_comes_in_one_error(folder):
    lines(folder / "a.jsonl", TEXT, "{", "[1, 2]")
    lines(folder / "b.jsonl", "7")
    says("a.jsonl:2: broken JSON", "2 rows that are no object:", "not a list: [1, 2]", "b.jsonl:1:", "data file not found: c.jsonl",
         sources=["a.jsonl", "b.jsonl", "c.jsonl"])  # fmt: skip


def test_a_json_file_that_is_no_list(folder):
    (folder / "a.json").write_text(json.dumps({"data": [TEXT], "version": 1}, indent=2))
    says("a.json holds one JSON object", "its 'data' is a list: write that list alone", sources="a.json")
    (folder / "a.json").write_text('[{"text": "a"},\n {"text": }]')
    says("a.json:2: broken JSON, Expecting value at column 11", sources="a.json")


def test_broken_csv(folder):
    (folder / "a.csv").write_text("prompt,completion\na,b\nc\nd,e,f\n")
    says("a.csv:3: 1 fields, but the header names 2 (prompt, completion)", "a.csv:4: 3 fields", sources="a.csv")
    (folder / "a.csv").write_text('text\n"never closed\n')
    says("a.csv:2: broken CSV", sources="a.csv")


def test_files_that_are_not_text(folder):
    (folder / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    says("a.jsonl:2: not UTF-8 text (byte 0xe9)")
    (folder / "b.bin").write_bytes(b"\0\1\2")
    says("b.bin is not text (it has zero bytes)", sources="b.bin")
    (folder / "c.parquet").write_bytes(b"PAR1 but nothing else")
    says("c.parquet is no parquet file that can be read", sources="c.parquet")


def test_mixed_shapes_name_the_first_line_of_each(folder):
    lines(folder / "a.jsonl", PROMPT, PROMPT, CHAT, PROMPT, TEXT)
    says("a.jsonl mixes rows of different shapes: prompt (first at a.jsonl:1), messages (first at a.jsonl:3), text (first at a.jsonl:5)")
    lines(folder / "a.jsonl", PROMPT)
    lines(folder / "b.jsonl", CHAT)
    assert [row.format for row in load_rows(["a.jsonl", "b.jsonl"])] == ["prompt", "messages"]  # files may differ


def test_fields(folder):
    lines(folder / "a.jsonl", {"prompt": "a"}, {"prompt": "a", "completion": 42}, {"prompt": None, "completion": "b"})
    says("a.jsonl:1: no 'completion' (format prompt; it has prompt)", "a.jsonl:2: 'completion' must be a text, but is a number: 42",
         "a.jsonl:3: 'prompt' must be a text, but is null")  # fmt: skip
    lines(folder / "a.jsonl", {"question": "a", "answer": "b"})
    says("a.jsonl:1: no known fields (it has question, answer)", "prompt: prompt + completion", "alpaca: instruction + output")
    says("data.format is 'chatml'; it can be auto, messages", format="chatml")
    lines(folder / "a.jsonl", TEXT)
    says("a.jsonl:1: no 'prompt' and no 'completion' (format prompt; it has text)", format="prompt")


def test_messages(folder):
    lines(
        folder / "a.jsonl",
        {"messages": "hi"},
        {"messages": [{"role": "user", "content": ["a", "b"]}]},
        {"messages": [{"role": "human", "content": "a"}]},
        {"messages": [{"role": "user"}, "hi"]},
    )
    says(
        "a.jsonl:1: 'messages' must be a list of messages, but is a text: hi",
        "a.jsonl:2: 'messages[0].content' must be a text, but is a list",
        "a.jsonl:3: messages[0] has the role 'human' (did you mean 'user'?); known are system, developer, user, assistant, tool",
        "2 messages of a wrong shape:",
        "a.jsonl:4: messages[1] must be an object with 'role' and 'content', but is hi",
    )
    lines(folder / "a.jsonl", {"conversations": [{"from": "robot", "value": "a"}]})
    says("conversations[0] has the role 'robot'; known are", "human, gpt")


def test_extras_that_are_not_installed(folder):
    """In a process of its own where the packages really cannot be imported."""
    (folder / "a.parquet").write_bytes(b"PAR1")
    code = """
        import sys
        sys.modules["pyarrow"] = sys.modules["datasets"] = None  # how Python itself marks a module that is not there
        from weft.data import load_rows
        from weft.core import WeftError
        for source in ("a.parquet", "hf:org/name[train]"):
            try:
                load_rows(source)
            except WeftError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "a.parquet is parquet, which needs pyarrow: pip install 'weft[parquet]'",
        "hf:org/name[train] is read with the datasets package: pip install 'weft[datasets]'",
    ]


def test_names_on_the_hub():
    says('write "hf:org/name", "hf:org/name[split]"', sources="hf:")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the datasets package (the extra weft[datasets])")
@pytest.mark.filterwarnings("default")  # what datasets warns of is its own affair
def test_a_data_set_by_name(folder, monkeypatch):
    """A folder stands in for the hub: datasets reads both in the same way."""
    (folder / "set").mkdir()
    lines(folder / "set" / "train.jsonl", *[PROMPT] * 5)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    rows = load_rows("hf:set[train[1:4]]")
    assert [row.where for row in rows] == [f"hf:set[train[1:4]][{i}]" for i in range(3)] and rows[0].format == "prompt"
    says("hf:set[nowhere]: ", sources="hf:set[nowhere]")
