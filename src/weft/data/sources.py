"""From a path, a glob or a data set's name to records: one JSON-like object a row, and where it stands."""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.core import WeftError
from weft.data.problems import Problems, shorten

HUB = re.compile(r"hf:(?P<name>[^\[:]+)(?::(?P<config>[^\[]+))?(?:\[(?P<split>.+)\])?")
KINDS = {".jsonl": "JSON", ".ndjson": "JSON", ".json": "JSON", ".parquet": "parquet", ".pq": "parquet", ".csv": "CSV", ".tsv": "CSV"}
TEXT = (".txt", ".md", ".rst", ".py", ".html", ".tex")


@dataclass
class Source:
    """One file or data set, read. kind: "JSONL", "JSON", "parquet", "CSV", "text" or "hub"."""

    name: str
    kind: str
    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (where, row)


def read(sources: str | Path | Sequence[str | Path]) -> list[Source]:
    """Read every source. All that is wrong with all of them is raised in one WeftError."""
    problems = Problems()
    names = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not names:
        raise WeftError("no data file is named; write for example data.train: data/train.jsonl")
    found: list[Source] = []
    for name in names:
        if str(name).startswith("hf:"):
            found.append(_hub(str(name)))
        else:
            found.extend(_file(path, problems) for path in _paths(str(name), problems))
    problems.check()
    return found


def _paths(name: str, problems: Problems) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p.suffix for p in path.iterdir() if p.suffix in KINDS)
        problems.add("folders", f"{name} is a folder; name its files, for example {path / ('*' + (files[0] if files else '.jsonl'))}")
        return []
    if any(c in name for c in "*?["):
        paths = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]  # noqa: PTH207 (absolute patterns too)
        if not paths:
            problems.add("patterns without a match", f"no file matches {name} (in {Path.cwd()})")
        return paths
    problems.add("missing files", f"data file not found: {name} (in {Path.cwd()}){_near(path)}")
    return []


def _near(path: Path) -> str:
    """What the user may have meant."""
    folder = path.parent
    if not folder.is_dir():
        hub = f'; for a data set on the hub write "hf:{path}"' if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.suffix else ""
        return f"; there is no folder {folder}{hub}"
    names = [p.name for p in folder.iterdir() if p.is_file()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(folder / n) for n in close)}?" if close else ""


def _file(path: Path, problems: Problems) -> Source:
    kind = KINDS.get(path.suffix.lower())
    try:
        with path.open("rb") as f:
            data = f.read(4096) if kind == "parquet" else f.read()
    except OSError as error:
        problems.add("files that cannot be read", f"{path} cannot be read: {error.strerror}")
        return Source(str(path), kind or "text")
    if kind is None and path.suffix.lower() not in TEXT:
        start = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()[:4]
        kind = "parquet" if start == b"PAR1" else "JSON" if start[:1] in (b"{", b"[") else None
    source = Source(str(path), kind or "text")
    if not data.strip():
        problems.add("empty files", f"{path} is empty")
    elif kind == "parquet":
        source.records = list(_parquet(path, problems))
    else:
        text = _decoded(path, data, problems)
        if text is not None:
            reader = {"JSON": _json, "CSV": _csv, "text": _text}[source.kind]
            source.records = list(reader(source, text, problems))
        if text is not None and not source.records and not problems:
            problems.add("files without rows", f"{path} has no rows")
    return source


def _decoded(path: Path, data: bytes, problems: Problems) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"{path}:{line}: not UTF-8 text (byte {data[error.start]:#04x}); weft reads JSONL, JSON, parquet, CSV and text in UTF-8"
        problems.add("files that are not text", what)
        return None


def _json(source: Source, text: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    if text.lstrip()[:1] == "[":
        yield from _json_list(source, text, problems)
        return
    source.kind = "JSONL"
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines[0][1].strip() == "{" and _one_object(source.name, text, problems):
        return
    for number, line in lines:
        where = f"{source.name}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"{where}: broken JSON, {error.msg} at column {error.colno}; the line begins {shorten(line, 48)}"
            problems.add("broken lines", what)
            continue
        if _is_object(where, value, problems):
            yield where, value


def _one_object(name: str, text: str, problems: Problems) -> bool:
    """A single object over many lines is no JSONL; say so once rather than once a line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    lists = [key for key, item in value.items() if isinstance(item, list)]
    inside = f" (its {shorten(lists[0])!r} is a list: write that list alone to a file)" if lists else ""
    problems.add("files that are no list", f"{name} holds one JSON object; rows are a JSON list or one object a line{inside}")
    return True


def _json_list(source: Source, text: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        what = f"{source.name}:{error.lineno}: broken JSON, {error.msg} at column {error.colno}; the line begins {shorten(line, 48)}"
        problems.add("broken lines", what)
        return
    for i, value in enumerate(values):
        where = f"{source.name}[{i}]"
        if _is_object(where, value, problems):
            yield where, value


def _is_object(where: str, value: object, problems: Problems) -> bool:
    if isinstance(value, dict):
        return True
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
    kind = names[type(value)]
    what = f'{where}: a row is a JSON object such as {{"prompt": "...", "completion": "..."}}, not {kind}: {shorten(value, 40)}'
    problems.add("rows that are no object", what)
    return False


def _csv(source: Source, text: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if source.name.lower().endswith(".tsv") else ",", strict=True)
    columns = reader.fieldnames or []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add("broken lines", f"{source.name}:{line}: broken CSV, {error}")
            return
        where = f"{source.name}:{line}"
        if None in row or None in row.values():
            count = len(columns) + len(row.get(None) or ()) - sum(value is None for value in row.values())
            what = f"{where}: {count} fields, but the header names {len(columns)} ({', '.join(columns)}); a field with a comma needs quotes"
            problems.add("broken lines", what)
            continue
        yield where, dict(row)


def _text(source: Source, text: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    if "\0" in text:
        what = f"{source.name} is not text (it has zero bytes); weft reads JSONL, JSON, parquet, CSV and text in UTF-8"
        problems.add("files that are not text", what)
        return
    yield source.name, {"text": text}


def _parquet(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise WeftError(f"{path} is parquet, which needs pyarrow: pip install 'weft[parquet]'") from error
    try:
        rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from ((f"{path}[{i}]", row) for i, row in enumerate(rows))
    except pyarrow.ArrowInvalid as error:
        problems.add("broken files", f"{path} is no parquet file that can be read: {shorten(str(error), 120)}")


def _hub(name: str) -> Source:
    match = HUB.fullmatch(name)
    if not match:
        raise WeftError(f'{name!r} does not name a data set; write "hf:org/name", "hf:org/name[split]" or "hf:org/name:config[split]"')
    try:
        import datasets
    except ImportError as error:
        raise WeftError(f"{name} is read with the datasets package: pip install 'weft[datasets]'") from error
    try:
        data = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise WeftError(f"{name}: {shorten(str(error), 300)}") from error
    return Source(name, "hub", [(f"{name}[{i}]", row) for i, row in enumerate(data)])
