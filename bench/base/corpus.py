"""Text for the embedded base, from CPython's own documentation and source: nothing is downloaded.

Kinds: `docs` (the help topics, the docstrings of the modules written in C, IDLE's help, the licence), `prose` (docstrings and comments of the
standard library and its tests, comments of the C headers), `code` (the modules themselves). Train and held-out are split by file: the hash of a
module's path decides, so the same module of another Python version falls on the same side. A paragraph that stands on both sides stays on
the held-out side only. The text is a pure function of the interpreters named.
"""

from __future__ import annotations

import ast
import hashlib
import html
import json
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.05
SALT = "weft"
TYPEWRITER = {0x2014: " -- ", 0x2013: "-", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2026: "...", 0xA0: " "}
SKIP = ("site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "bad_coding", "badsyntax", "turtledemo")
# Modules in C have no source in an installation; their docstrings are read from the running objects of each interpreter.
C_DOCS = """
import importlib, importlib.util, inspect, json, sys, warnings
warnings.simplefilter("ignore")
out = {}
for name in sorted(sys.stdlib_module_names):
    if name.startswith("_test") or name in ("antigravity", "this", "idlelib", "turtle") : continue
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or (spec.origin or "").endswith(".py") or spec.origin == "frozen": continue
        module = importlib.import_module(name)
    except Exception:
        continue
    found = {name: module.__doc__}
    for key, value in sorted(vars(module).items()):
        if key.startswith("__"): continue
        found[name + "." + key] = inspect.getdoc(value) if callable(value) else None
        if inspect.isclass(value):
            for k, v in sorted(vars(value).items()):
                if callable(v) and not k.startswith("__"): found[name + "." + key + "." + k] = inspect.getdoc(v)
    out[name] = {k: v for k, v in found.items() if isinstance(v, str) and v.strip()}
print(json.dumps(out))
"""


@dataclass(frozen=True)
class Document:
    kind: str  # "docs", "prose" or "code"
    held_out: bool
    path: str  # what the split was decided by
    text: str


def held_out(path: str) -> bool:
    """The side of a file, by the hash of its path below the standard library."""
    return int.from_bytes(hashlib.sha256((SALT + path).encode()).digest()[:4], "big") / 2**32 < HELD_OUT_SHARE


def is_prose(text: str) -> bool:
    """Whether a paragraph is mostly words: commented-out code and tables are not."""
    words = re.findall(r"[A-Za-z]{2,}", text)
    letters = sum(c.isalpha() or c == " " for c in text)
    symbols = sum(c in "=(){}[]_<>*/\\|+~^%$#@" for c in text)
    return len(words) >= 6 and letters / len(text) > 0.8 and symbols / len(text) < 0.06


def comments(source: str) -> Iterator[str]:
    """Blocks of whole-line comments, without their marks, where they are prose."""
    for block in re.findall(r"(?:^[ \t]*#[^\n]*\n)+", source, re.M):
        lines = [re.sub(r"^[ \t]*#+ ?", "", line) for line in block.splitlines()]
        for part in "\n".join(lines).split("\n\n"):
            part = textwrap.dedent(part).strip("\n -=*#")
            if is_prose(part):
                yield part


def docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(qualified name with its arguments, docstring) of the module, its classes and functions, in order."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
            yield name + (arguments if len(arguments) < 80 else "(...)"), doc
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) else name
            yield from walk(child, inner)

    return walk(tree, module)


def plain(text: str) -> str:
    """ASCII: typographic dashes and quotes become their typewriter forms, what has none is dropped."""
    return text.translate(TYPEWRITER).encode("ascii", "ignore").decode()


class Unseen:
    """Keeps of every text only the paragraphs that have not been kept before."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, text: str, separator: str = "\n\n") -> str:
        kept = []
        for part in text.split(separator):
            key = re.sub(r"\W+", " ", part).strip().lower()
            if key not in self.seen:
                kept.append(part)
            self.seen.add(key)
        return separator.join(kept).strip("\n") + "\n" if any(len(p.strip()) >= 25 for p in kept) else ""


@dataclass(frozen=True)
class Python:
    executable: str
    version: str
    stdlib: Path
    include: Path

    @staticmethod
    def find(executable: str) -> Python:
        ask = "import sys, sysconfig as s; p = s.get_paths(); print(sys.version.split()[0], p['stdlib'], p['include'], sep='\\n')"
        version, stdlib, include = subprocess.run([executable, "-c", ask], check=True, capture_output=True, text=True).stdout.splitlines()
        return Python(executable, version, Path(stdlib), Path(include))

    def modules(self) -> list[Path]:
        found = (f for f in self.stdlib.rglob("*.py") if not any(part in SKIP for part in f.relative_to(self.stdlib).parts))
        return sorted(f for f in found if "lib2to3/tests/data" not in f.as_posix())


def docs(python: Python) -> Iterator[tuple[str, str]]:
    """(path, text) of everything that was written to be read."""
    scope: dict[str, dict[str, str]] = {}
    exec((python.stdlib / "pydoc_data" / "topics.py").read_text(encoding="utf-8"), scope)
    yield from ((f"pydoc_data/topics.py#{name}", text) for name, text in sorted(scope["topics"].items()))
    found = json.loads(subprocess.run([python.executable, "-I", "-c", C_DOCS], check=True, capture_output=True, text=True).stdout)
    for module, members in found.items():
        yield f"{module} (C)", "\n\n".join(f"{name}\n{text}" for name, text in members.items())
    page = (python.stdlib / "idlelib" / "help.html").read_text(encoding="utf-8")
    yield "idlelib/help.html", html.unescape(re.sub(r"\n{3,}", "\n\n", re.sub(r"<[^>]+>", "", page)))
    yield "LICENSE.txt", (python.stdlib / "LICENSE.txt").read_text(encoding="utf-8")


def source(python: Python) -> Iterator[tuple[str, str, ast.Module]]:
    for file in python.modules():
        try:
            text = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in test modules
                yield file.relative_to(python.stdlib).as_posix(), text, ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a few test modules are broken on purpose


def build(executables: list[str]) -> tuple[list[Document], list[str]]:
    """All documents, and the versions they came from. Code is taken from the first interpreter only; the others add prose."""
    pythons = [Python.find(e) for e in executables or [sys.executable]]
    raw: list[tuple[str, str, str]] = []  # kind, path, text
    for number, python in enumerate(pythons):
        raw += [("docs", path, text) for path, text in docs(python)]
        for path, text, tree in source(python):
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            named = "\n\n".join(f"{name}\n{doc}" for name, doc in docstrings(tree, module) if is_prose(doc.split(">>>")[0]))
            raw += [("prose", path, named), ("prose", path, "\n\n".join(comments(text)))]
            if number == 0:
                raw.append(("code", path, text))
        for header in sorted(python.include.rglob("*.h")):
            found = re.findall(r"/\*(.*?)\*/", header.read_text(encoding="utf-8", errors="replace"), re.S)
            parts = [textwrap.dedent(re.sub(r"^[ \t]*\* ?", "", part, flags=re.M)).strip() for part in found]
            raw.append(("prose", "include/" + header.name, "\n\n".join(p for p in parts if p and is_prose(p))))
    documents = []
    unseen = {"text": Unseen(), "code": Unseen()}
    for side in (True, False):  # the held-out side first: what stands on both sides is not trained on
        for kind, path, text in raw:
            if held_out(path) == side:
                kept = unseen["code"](text, "\n\n\n") if kind == "code" else unseen["text"](text)
                if kept:
                    documents.append(Document(kind, side, path, kept if kind == "code" else plain(kept)))
    return documents, [p.version for p in pythons]
