"""Every setting of a recipe as a flag, with its type, default and help: derived from the dataclasses, whose docstrings are the help."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from weft.core import METHODS, Method
from weft.train import Recipe
from weft.train.reading import in_words as words


def add(parser: argparse.ArgumentParser, shown: Sequence[str] | None = None) -> None:
    """One flag for every setting, a group for every part of the recipe and for every method `shown`: all of them if None."""
    methods = _sorted()
    top = parser.add_argument_group("recipe", _first(Recipe))
    hints, helps = get_type_hints(Recipe), documented(Recipe)
    for f in fields(Recipe):
        kind = hints[f.name]
        if issubclass(kind, Method) if isinstance(kind, type) else False:
            default = _default(f)
            _flag(top, f.name, Literal[tuple(methods)], type(default).__name__, helps.get(f.name, ""))
        elif not is_dataclass(kind):
            _flag(top, f.name, kind, _default(f), helps.get(f.name, ""))
    for f in fields(Recipe):
        kind = hints[f.name]
        if isinstance(kind, type) and issubclass(kind, Method):
            _methods(parser, f.name, {name: cls for name, cls in methods.items() if shown is None or name in shown})
        elif is_dataclass(kind):
            group = parser.add_argument_group(f.name, _first(kind))
            for name, inner, default, text in _settings(kind):
                _flag(group, f"{f.name}.{name}", inner, default, text)


def _methods(parser: argparse.ArgumentParser, prefix: str, shown: dict[str, type[Method]]) -> None:
    """What all methods have, then what each has of its own. A name that several share stands once, with the default of each."""
    group = parser.add_argument_group(prefix, "What every method has.")
    for name, kind, default, text in _settings(Method):
        _flag(group, f"{prefix}.{name}", kind, default, text)
    owners: dict[str, list[tuple[str, Any]]] = {}
    for title, cls in shown.items():
        for name, _, default, _ in _settings(cls):
            owners.setdefault(name, []).append((title, default))
    done = {f.name for f in fields(Method)}
    for title, cls in shown.items():
        own = [s for s in _settings(cls) if s[0] not in done]
        done |= {s[0] for s in own}
        if own:
            group = parser.add_argument_group(f"{prefix} {title}", _first(cls))
        for name, kind, default, text in own:
            also = [f"{t}: {_shown(d)}" for t, d in owners[name][1:]]
            _flag(group, f"{prefix}.{name}", kind, default, text + (f" Also of {', '.join(also)}." if also else ""))


def _sorted() -> dict[str, type[Method]]:
    """The methods by name, with the one first that is meant where none is named: its defaults are those that most want to see."""
    first = type(next(_default(f) for f in fields(Recipe) if f.name == "method")).__name__
    return {name: METHODS[name] for name in sorted(METHODS, key=lambda name: (name != first, name.lower()))}


def _settings(cls: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """(name, type, default, help) of each field."""
    hints, helps = get_type_hints(cls), documented(cls)
    for f in fields(cls):
        yield f.name, hints[f.name], _default(f), helps.get(f.name, "")


def documented(cls: type) -> dict[str, str]:
    """Help by field: the docstring under it, or its entry under `Args:`; a base class's where the class says nothing."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if is_dataclass(each) and each.__doc__:
            found |= _args(each) | _below(each.__module__).get(each.__qualname__, {})
    return {name: " ".join(text.split()) for name, text in found.items()}


def _args(cls: type) -> dict[str, str]:
    """What stands behind each name under `Args:` in the class's docstring."""
    listed = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[2]
    return dict(re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", re.split(r"^\S", listed, maxsplit=1, flags=re.M)[0], re.M))


@cache
def _below(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the docstring under it, of one module. Python keeps it nowhere but in the source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # no file: a method that was typed in
        return {}
    return {
        cls.name: {
            ast.unparse(field.target): text.value.value for field, text in pairwise(cls.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for cls in tree.body if isinstance(cls, ast.ClassDef)
    }  # fmt: skip


def _first(cls: type) -> str:
    """The first line of a class's docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _flag(group: Any, name: str, kind: Any, default: Any, text: str) -> None:
    """A flag whose value stays text: `load_recipe` reads it, and finds all that is wrong at once."""
    shown = "must be given" if default is MISSING else f"default: {_shown(default)}"
    text = text[:1].upper() + text[1:] if text[1:2].isalpha() else text  # not a formula's r
    text += "" if not text or text[-1] in ".!?" else "."
    about = f"{text} [{words(kind)}; {shown}]".replace("%", "%%")
    action = group.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar="V", help=about)
    action.values = choices(kind)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return format(value, "g") if isinstance(value, float) else str(value)


def choices(kind: Any) -> list[str]:
    """The words that a value can be, where they can be counted: for completion."""
    if get_origin(kind) is Literal:
        return [str(v) for v in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        found = [w for k in get_args(kind) for w in choices(k)]
        return found if found else []
    return []
