"""Everything wrong with the data, told at once."""

from __future__ import annotations

from weft.core import WeftError

SHOWN = 5  # of one kind; the rest are counted


class Problems:
    """Collects what is wrong, by kind, and raises one WeftError that holds it all."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._count: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, kind: str, text: str) -> None:
        """kind: what such problems are called, in the plural ("broken lines"); text: where it is, what it is, what to write instead."""
        self._count[kind] = self._count.get(kind, 0) + 1
        found = self._found.setdefault(kind, [])
        if len(found) < SHOWN:
            found.append(text)

    def check(self) -> None:
        """Raises WeftError if anything was added."""
        if not self:
            return
        parts = []
        for kind, found in self._found.items():
            count = self._count[kind]
            if count == 1:
                parts.append(found[0])
            else:
                head = f"{count} {kind}" + (f", the first {SHOWN}:" if count > SHOWN else ":")
                parts.append("\n".join([head, *(f"  {line}" for line in found)]))
        raise WeftError("\n".join(parts))


def shorten(text: object, limit: int = 60) -> str:
    """The beginning of a value, on one line."""
    line = " ".join((text if isinstance(text, str) else repr(text)).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
