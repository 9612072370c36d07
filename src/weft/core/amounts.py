"""How much memory, as people write it."""

from __future__ import annotations

import re

from weft.core.errors import WeftError

UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def amount(memory: float | str, said: str = "memory") -> float | None:
    """A share from 0 to 1 or, above 1, bytes; None for "auto". said: what the user calls it.

    Raises:
        WeftError: it is none of these.
    """
    if memory == "auto":
        return None
    told = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]I?B)?\s*", str(memory).upper()) if isinstance(memory, str) else None
    value = float(told[1]) * UNITS[told[2] or ""] if told else memory
    if isinstance(value, str) or not 0 <= value < float("inf"):
        raise WeftError(f'{said}: {memory!r} is not "auto", a share from 0 to 1, nor a number of bytes such as "40GB"')
    return float(value)
