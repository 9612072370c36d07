"""What an adapter derives from its weights and keeps from one call to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Kept(dict[str, Any]):
    """What is worth keeping from one call to the next. A copied or pickled adapter starts with nothing."""

    def __reduce__(self) -> Any:
        return Kept, ()


def written(tensors: Iterable[Tensor | None]) -> tuple[tuple[int, int], ...]:
    """Where the tensors lie and how often each has been written to: what was derived from them holds while this stays."""
    return tuple((t.data_ptr(), t._version) for t in tensors if t is not None)
