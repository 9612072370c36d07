"""From records to rows: which of the known shapes they have, checked, and in one form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.core import WeftError
from weft.data.problems import Problems, shorten
from weft.data.sources import Source, read

FIELDS = {  # in the order in which they are looked for: a row with `messages` and `prompt` is a chat
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "function_response": "tool"}
TYPES = {list: "a list", dict: "an object", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data: a chat (`messages`) or a running text (`text`).

    where: for error messages, "train.jsonl:17".  format: the shape it was written in.  source: the file or data set.
    tools: what the chat template is told about tools, if the row has them.  split: a document, cut into rows instead of cut off.
    """

    where: str
    format: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    tools: list[Any] | None = None
    source: str = ""
    kind: str = ""
    split: bool = False


def load_rows(sources: str | Path | Sequence[str | Path], format: str = "auto") -> list[Row]:
    """Read rows from a path, a glob, "hf:org/name[split]", or a list of them.

    format: "auto", or one of messages, sharegpt, prompt, alpaca, text. All rows of one file have one shape.
    Raises WeftError that names every problem found: missing, empty or broken files, rows with missing or wrong fields, mixed shapes.
    """
    if format != "auto" and format not in FIELDS:
        raise WeftError(f"data.format is {format!r}; it can be auto, {', '.join(FIELDS)}")
    problems, rows = Problems(), []
    for source in read(sources):
        shape = _shape(source, problems) if format == "auto" else format
        if shape:
            for where, record in source.records:
                row = _row(shape, where, record, source, problems)
                if row is not None:
                    rows.append(row)
    problems.check()
    return rows


def _known() -> str:
    return "; ".join(f"{name}: {' + '.join(fields)}" for name, fields in FIELDS.items())


def _detect(record: dict[str, Any]) -> str | None:
    """The first shape whose fields are all there, else the first of which one is (so that the missing one can be named)."""
    for wanted in (all, any):
        for name, fields in FIELDS.items():
            if wanted(field in record for field in fields):
                return name
    return None


def _shape(source: Source, problems: Problems) -> str | None:
    """The one shape of all records, else a problem and None."""
    first: dict[str, str] = {}
    unknown: dict[str, list[str]] = {}  # where the rows are, by the fields that they have
    for where, record in source.records:
        shape = _detect(record)
        if shape is None:
            has = ", ".join(shorten(key, 30) for key in record) or "nothing"
            unknown.setdefault(has, []).append(where)
        else:
            first.setdefault(shape, where)
    for has, places in unknown.items():
        like = f" and {len(places) - 1:,} more like it" * (len(places) > 1)
        problems.add(
            "kinds of rows of unknown shape",
            f"{places[0]}{like}: no known fields (it has {has}); rename them, or write rows anew, as {_known()}",
        )
    if len(first) > 1:
        shapes = ", ".join(f"{name} (first at {where})" for name, where in first.items())
        advice = "Put each shape into a file of its own, or set data.format to the one meant"
        what = f"{source.name} mixes rows of different shapes: {shapes}. {advice}"
        problems.add("files of mixed shapes", what)
        return None
    return None if unknown else next(iter(first), None)


def _row(shape: str, where: str, record: dict[str, Any], source: Source, problems: Problems) -> Row | None:
    missing = [name for name in FIELDS[shape] if name not in record]
    if missing:
        has = ", ".join(shorten(key, 30) for key in record) or "nothing"
        problems.add("rows with missing fields", f"{where}: no {' and no '.join(map(repr, missing))} (format {shape}; it has {has})")
        return None
    about = {"where": where, "format": shape, "source": source.name, "kind": source.kind}
    if shape in ("messages", "sharegpt"):
        messages = _messages(shape, where, record, problems)
        tools = record.get("tools")
        return None if messages is None else Row(messages=messages, tools=tools if isinstance(tools, list) else None, **about)
    optional = ("input", "system") if shape == "alpaca" else ()
    texts = {name: _text(where, name, record[name], problems) for name in FIELDS[shape]}
    texts |= {name: _text(where, name, record[name], problems) for name in optional if record.get(name) is not None}
    if None in texts.values():
        return None
    if shape == "text":
        return Row(text=texts["text"], split=source.kind == "text", **about)
    if shape == "prompt":
        question, answer = texts["prompt"], texts["completion"]
    else:
        question, answer = "\n\n".join(filter(None, (texts["instruction"], texts.get("input")))), texts["output"]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if texts.get("system"):
        messages.insert(0, {"role": "system", "content": texts["system"]})
    return Row(messages=tuple(messages), **about)


def _text(where: str, name: str, value: object, problems: Problems) -> str | None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"{where}: {name!r} holds {value[error.start]!a}, which is one half of a character: write both, or leave it out"
            problems.add("texts that are no Unicode", what)
            return None
        return value
    kind = TYPES.get(type(value), type(value).__name__)
    problems.add("fields of a wrong type", f"{where}: {name!r} must be a text, but is {kind}: {shorten(value, 40)}")
    return None


def _messages(shape: str, where: str, record: dict[str, Any], problems: Problems) -> tuple[dict[str, Any], ...] | None:
    """The messages of a chat row, roles in transformers' words. Other keys of a message (tool_calls, name) are kept."""
    top = FIELDS[shape][0]
    who, what = ("role", "content") if shape == "messages" else ("from", "value")
    given = record[top]
    if not isinstance(given, list):
        kind = TYPES.get(type(given), type(given).__name__)
        problems.add("fields of a wrong type", f"{where}: {top!r} must be a list of messages, but is {kind}: {shorten(given, 40)}")
        return None
    messages, good = [], True
    if shape == "sharegpt" and isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    for i, message in enumerate(given):
        name = f"{top}[{i}]"
        if not isinstance(message, dict) or who not in message or (what not in message and not message.get("tool_calls")):
            text = f'{where}: {name} must be an object with {who!r} and {what!r}, but is {shorten(message, 60)}'
            problems.add("messages of a wrong shape", text)
            good = False
            continue
        role = SHAREGPT.get(message[who], message[who]) if shape == "sharegpt" else message[who]
        if role not in ROLES:
            known = ", ".join((*ROLES, *SHAREGPT) if shape == "sharegpt" else ROLES)
            meant = f" (did you mean {SHAREGPT[role]!r}?)" if isinstance(role, str) and role in SHAREGPT else ""
            problems.add("unknown roles", f"{where}: {name} has the role {shorten(message[who], 30)!r}{meant}; known are {known}")
            good = False
            continue
        content = message.get(what)
        if content is None and message.get("tool_calls"):
            content = ""
        content = _text(where, f"{name}.{what}", content, problems)
        good = good and content is not None
        rest = {key: value for key, value in message.items() if key not in (who, what) and value is not None}
        messages.append({"role": role, "content": content, **rest})
    return tuple(messages) if good else None


def shapes(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows came in which shape and from which kind of file: {"prompt (JSONL)": 300}."""
    return dict(Counter(f"{row.format} ({row.kind})" if row.kind else row.format for row in rows))
