"""How the user names layers: paths or their ends, globs, regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from weft.core.errors import WeftError

T = TypeVar("T")


def matcher(target: str) -> Callable[[str], bool]:
    """Whether a path is meant by a target: a path or its end, a glob for either, or "re:" and a regular expression for the whole path."""
    if target.startswith("re:"):
        try:
            pattern = re.compile(target[3:])
        except re.error as e:
            raise WeftError(f"{target!r} is no regular expression: {e}") from None
        return lambda path: pattern.fullmatch(path) is not None
    if any(c in target for c in "*?["):
        return lambda path: fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}")
    return lambda path: path == target or path.endswith(f".{target}")


def by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first regular expression that matches the end of a path, as in peft's rank_pattern; else the default."""
    return next((v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", path)), default)


def several(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """One target or several, as a tuple."""
    return (given,) if isinstance(given, str) else given
