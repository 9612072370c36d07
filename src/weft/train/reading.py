"""Recipes from YAML, dicts and command-line flags, and back; all that is wrong with one in a single error."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from weft.core import METHODS, PEFT, Method, WeftError
from weft.data import DataConfig
from weft.data.sources import KINDS
from weft.train.recipe import Recipe, check

ELSEWHERE = PEFT | {  # what other tools call a setting
    "learning_rate": "lr", "rate": "lr", "num_epochs": "epochs", "num_train_epochs": "epochs", "max_steps": "steps",
    "gradient_accumulation_steps": "accumulate", "max_grad_norm": "clip", "grad_clip": "clip", "warmup_steps": "warmup",
    "warmup_ratio": "warmup", "lr_scheduler": "schedule", "scheduler": "schedule", "batch_size": "tokens", "save_steps": "save_every",
    "eval_steps": "eval_every", "output_dir": "output", "logging_steps": "log_every", "base_model": "model",
    "model_name_or_path": "model",
}  # fmt: skip
_NOTHING = object()  # what `_read` gives where there is a problem


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-3 is a number (YAML 1.1 wants 1.0e-3) and whose repeated keys are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands here twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def load_recipe(source: str | Path | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file (or a mapping, or the defaults for None), with overrides on top.

    Args:
        source: a path to YAML, or what such a file holds.
        overrides: dotted keys to values ({"method.rank": 16}), or flags (["--method.rank", "16", "--train.lr=1e-3"]).

    Raises:
        WeftError: one error that lists every unknown key with the nearest right one, every wrong type, and every value out of range.
    """
    where, tree = _source(source)
    recipe, problems = _recipe(tree, overrides)
    _refuse(where, problems)
    return recipe


def load_recipes(source: str | Path | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> list[Recipe]:
    """The recipes of a file whose `runs:` lists what differs from one run to the next; one recipe for a file without it.

    Each run needs a name of its own. Its output is `<output>/<name>` unless it says otherwise. Overrides go over every run.
    Raises WeftError as `load_recipe`, of all runs at once.

        data: {train: rows.jsonl}
        output: sweep
        runs:
          - {name: r8, method: {rank: 8}}
          - {name: r32, method: {rank: 32}, train.lr: 1e-4}
    """
    where, tree = _source(source)
    runs = tree.pop("runs", None)
    if runs is None:
        recipe, wrong = _recipe(tree, overrides)
        _refuse(where, wrong)
        return [recipe]
    example = "each needs a name of its own, as in `- {name: r8, method: {rank: 8}}`"
    if not isinstance(runs, list) or not runs:
        raise WeftError(f"{where}: runs: expected a list of settings, and got {runs!r}; {example}")
    wrong = []
    if odd := [str(i) for i, r in enumerate(runs, 1) if not isinstance(r, Mapping) or not isinstance(r.get("name"), str)]:
        wrong.append(f"runs: number {', '.join(odd)} of {len(runs)} has no name; {example}")
    named = [r for r in runs if isinstance(r, Mapping) and isinstance(r.get("name"), str)]
    names = [r["name"] for r in named]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        wrong.append(f"runs: two runs are named {', '.join(twice)}; {example}")
    over = dict(overrides if isinstance(overrides, Mapping) else _flags(overrides, wrong))
    root = over.pop("output", tree.get("output", "adapter"))
    made = [_recipe(deepcopy(tree), {"output": f"{root}/{run['name']}"} | dict(_dotted(run)) | over) for run in named]
    of_all = [p for p in made[0][1] if all(p in problems for _, problems in made)] if made else []
    wrong += of_all + [f"run {name}: {p}" for name, (_, problems) in zip(names, made, strict=True) for p in problems if p not in of_all]
    _refuse(where, wrong)
    return [recipe for recipe, _ in made]


def _refuse(where: str, problems: Sequence[str]) -> None:
    if problems:
        raise WeftError(f"{where} cannot be used:\n  " + "\n  ".join(problems))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"train": {"lr": 1}} as ("train.lr", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and (prefix + str(key)).count(".") < 1:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _recipe(tree: dict[str, Any], overrides: Mapping[str, Any] | Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe, and what is wrong with it: if anything is, it is not to be used."""
    problems: list[str] = []
    for key, value in overrides.items() if isinstance(overrides, Mapping) else _flags(overrides, problems):
        _put(tree, key.split("."), value, problems)
    recipe = _read(Recipe, tree, "", problems)
    problems += check(recipe)  # of what cannot be read it sees the defaults, in which nothing is wrong
    return recipe, problems


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as plain dicts, lists, strings and numbers, every default filled in; the method as {name: LoRA, rank: 16, ...}."""
    out: dict[str, Any] = {}
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        out[f.name] = value.to_dict() if isinstance(value, Method) else _plain(asdict(value) if is_dataclass(value) else value)
    return out


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML; `load_recipe` of it gives the same recipe."""
    return yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Lists in one line, floats so that YAML 1.1 readers see numbers too."""


_Dumper.add_representer(list, lambda d, x: d.represent_sequence("tag:yaml.org,2002:seq", x, flow_style=True))


def settings(of: Any = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, default) of every setting, method left whole; default `MISSING` where one must be given."""
    hints = get_type_hints(of)
    for f in fields(of):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        kind = hints[f.name]
        if is_dataclass(kind) and not issubclass(kind, Method):
            yield from settings(kind, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, kind, default


def _source(source: str | Path | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    if source is None or isinstance(source, Mapping):
        return "the recipe", _plain(source or {})
    path = Path(source)
    if path.suffix.lower() in KINDS and path.suffix.lower() != ".json":  # which may hold a recipe
        raise WeftError(f"{path}: a recipe is a YAML file, and this looks like data: write --data.train {path}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as e:
        raise WeftError(f"{path}: the recipe cannot be read ({e.strerror}). Give the path of a YAML file.") from e
    except UnicodeDecodeError as e:
        raise WeftError(f"{path}: not a text file in UTF-8, so no recipe") from e
    except yaml.YAMLError as e:
        raise WeftError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise WeftError(f"{path}: a recipe is a mapping of settings (`model: embedded`), and this is a {type(tree).__name__}")
    return str(path), tree


def _flags(argv: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            problems.append(f"{word}: expected a flag such as --train.lr 1e-3")
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"--{key}: needs a value")
                continue
            text = words.pop(0)
        try:
            yield key.replace("-", "_"), yaml.load(text, Loader=_Loader)  # a SafeLoader
        except yaml.YAMLError:
            yield key.replace("-", "_"), text  # a path with a colon, say


def _put(tree: dict[str, Any], keys: list[str], value: Any, problems: list[str]) -> None:
    for i, key in enumerate(keys[:-1]):
        below = tree.setdefault(key, {})
        if keys[i] == "method" and not i and not isinstance(below, Mapping):
            below = {"name": below}
        elif not isinstance(below, Mapping):
            problems.append(f"{'.'.join(keys)}: {'.'.join(keys[: i + 1])} is {below!r} and holds no settings")
            return
        tree[key] = below = dict(below)
        tree = below
    tree[keys[-1]] = value


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _read(cls: Any, given: Any, at: str, problems: list[str]) -> Any:
    """An instance of the dataclass `cls` from a mapping; what is wrong goes to `problems` with its dotted key.

    With problems, methods and data are _NOTHING (their values hang together), and other parts have their defaults for what is wrong.
    """
    if not isinstance(given, Mapping):
        problems.append(f"{at}: expected settings ({', '.join(f.name for f in fields(cls))}), got {given!r}")
        return _NOTHING if issubclass(cls, Method | DataConfig) else cls()
    hints = get_type_hints(cls)
    dot = f"{at}." if at else ""
    known = [f.name for f in fields(cls)]
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            problems.append(f"{dot}{key}: unknown{_nearest(f'{dot}{key}', [dot + k for k in known])}")
            continue
        kind = hints[key]
        if isinstance(kind, type) and issubclass(kind, Method):
            values[key] = _method(value, dot + key, problems)
        elif is_dataclass(kind):
            values[key] = _read(kind, value, dot + key, problems)
        else:
            values[key] = _value(kind, value)
            if values[key] is _NOTHING:
                several = isinstance(value, str) and "," in value and "a list of" in in_words(kind)
                listed = f"; a list is written '[{value.strip('[]')}]'" if several else ""
                problems.append(f"{dot}{key}: expected {in_words(kind)}, got {value!r}{listed}")
    for name in (f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING and f.name not in given):
        if is_dataclass(hints[name]):
            _read(hints[name], {}, dot + name, problems)  # says what it needs
        else:
            problems.append(f"{dot}{name}: must be given ({in_words(hints[name])})")
        values[name] = _NOTHING
    if any(v is _NOTHING for v in values.values()):
        if issubclass(cls, Method | DataConfig):
            return _NOTHING
        values = {name: v for name, v in values.items() if v is not _NOTHING or name == "data"}
    try:
        return cls(**values)
    except WeftError as e:  # its own checks of the values
        problems += [line if at and line.startswith(at) else f"{at}: {line.strip()}" for line in str(e).splitlines()]
        return _NOTHING


def _method(given: Any, at: str, problems: list[str]) -> Any:
    """A Method from "LoRA", {name: LoRA, rank: 16}, {rank: 16} (of the default method), or jsonargparse's class_path and init_args."""
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        problems.append(f"{at}: expected a method, as in `{at}: LoRA` or `{at}: {{name: LoRA, rank: 16}}`, got {given!r}")
        return _NOTHING
    values = dict(given)
    if "class_path" in values:
        inner = values.pop("init_args", None) or {}
        values = {"name": str(values.pop("class_path")).rpartition(".")[2], **values, **inner}
    name = values.pop("name", "LoRA")
    cls = {k.lower(): v for k, v in METHODS.items()}.get(str(name).lower())
    if cls is None:
        near = get_close_matches(str(name), METHODS, n=1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(METHODS))}"
        problems.append(f"{at}.name: unknown method {name!r}; {known}")
        return _NOTHING
    return _read(cls, values, at, problems)


def _nearest(key: str, siblings: list[str]) -> str:
    """"; did you mean train.lr?": a sibling that looks alike or goes by a well-known other name, or a setting of that name elsewhere."""
    dot, _, last = key.rpartition(".")
    dot = f"{dot}." if dot else ""
    everywhere = [k for k, _, _ in settings()] + [f"method.{k}" for cls in METHODS.values() for k in (f.name for f in fields(cls))]
    named = ELSEWHERE.get(last, last)
    if named.startswith("weft."):
        return f"; that is a method of its own, method.name: {named.removeprefix('weft.')}"
    if (hit := dot + named) in siblings:
        return f"; did you mean {hit}?"
    if elsewhere := [k for k in everywhere if k.rpartition(".")[2] == named]:
        return f"; did you mean {elsewhere[0]}?"
    if near := get_close_matches(last, [s.rpartition(".")[2] for s in siblings], n=1):
        return f"; did you mean {dot}{near[0]}?"
    if near := get_close_matches(key, everywhere, n=1):
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(siblings)}"


def _value(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, or _NOTHING. Nothing is guessed but what YAML and flags cannot tell apart (2 for 2.0, a list for a tuple)."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        tries = (_value(k, value) for k in sorted(args, key=lambda k: k is not type(value)))  # the exact type first
        return next((v for v in tries if v is not _NOTHING), _NOTHING)
    if origin is Literal:
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) and True not in args else value  # YAML's on and off
        return value if value in args else _NOTHING
    if kind in (None, type(None)):
        return None if value is None else _NOTHING
    if kind is bool:
        return value if isinstance(value, bool) else _NOTHING
    if kind is int:
        whole = isinstance(value, float) and value.is_integer()
        return int(value) if (isinstance(value, int) and not isinstance(value, bool)) or whole else _NOTHING
    if kind is float:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _NOTHING
    if kind in (str, Path):
        return kind(value) if isinstance(value, str | Path) else _NOTHING
    if origin in (list, tuple, Sequence) or str(origin) == "<class 'collections.abc.Sequence'>":
        if not isinstance(value, list | tuple):
            return _NOTHING
        fixed = origin is tuple and args[-1] is not Ellipsis
        items = [_value(k, v) for k, v in zip(args if fixed else [args[0]] * len(value), value, strict=False)]
        if any(i is _NOTHING for i in items) or len(items) != len(value) or (fixed and len(args) != len(value)):
            return _NOTHING
        return tuple(items) if origin is tuple else items
    if isinstance(value, Mapping) and isinstance(origin, type) and issubclass(origin, Mapping):
        held = {_value(args[0], k): _value(args[1], v) for k, v in value.items()}
        return _NOTHING if _NOTHING in held or _NOTHING in held.values() else held
    return value if isinstance(origin or kind, type) and isinstance(value, origin or kind) else _NOTHING


def in_words(kind: Any) -> str:
    """A type in the user's words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(k) for k in sorted(args, key=lambda k: k is type(None)))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(map(in_words, args))}"
    if origin in (list, tuple) or "Sequence" in str(origin):
        return f"a list of {in_words(args[0])}s".replace("a list of a ", "a list of ")
    if origin is not None:
        return "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path", type(None): "null"}
    return words.get(kind, str(kind))
