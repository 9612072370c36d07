"""Where an activated LoRA begins in every row: found among the tokens, noted on the cache, asked for by the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from weft.core import WeftError
from weft.methods.prompt_call import length

NEVER = -1  # where a row begins that has no invocation


class Gate:
    """What the layers of one adapter share.

    off: (n, T, 1) bool, the tokens before the invocation in the adapter's own rows of the call under way; None: no call is under way.
    every: the same for all rows of a batch with several adapters, false in rows of other methods.
    offsets: where each row begins, counted back from the end of the next call (None: nowhere), in place of a search there and afterwards.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.key = tuple(tokens), uuid4().hex
        self.off: Tensor | None = None
        self.every: Tensor | None = None
        self.offsets: Sequence[int | None] | None = None
        self.told: Tensor | None = None  # (n,) the same from the front
        self.tried = False  # whether a batch of the training has been looked at

    def open(self, off: Tensor | None, every: Tensor | None, _: Any = None) -> None:
        self.off, self.every = off, every

    def before(self, y: Tensor, off: Tensor | None) -> Tensor:
        """`off` or `every` for the output of a layer: (n, T, 1), or (n·T, 1) where the layer has all tokens in one list."""
        if off is None:
            raise WeftError("a layer with an ALoRA was called without its model, which finds the invocation: call the model itself")
        if y.shape[:-1] == off.shape[:-1]:
            return off
        if y.dim() == 2 and y.shape[0] == off.shape[0] * off.shape[1]:
            return off.view(-1, 1)
        raise WeftError(
            f"ALoRA on a layer whose output is {tuple(y.shape)}, where the model was given {tuple(off.shape[:2])} tokens: it does not see "
            "every token in its place, as a head or an expert does not, or a prompt stands in front; leave it out with exclude=..."
        )

    def starts(self, ids: Tensor, past: Any, begins: Tensor | None) -> Tensor:
        """(n, 1 or T) the place from which each row (or the row of each packed token) is adapted, counted from the front of the cache; or
        NEVER.

        The last invocation in `ids` counts; without one, what an earlier call has noted on the cache. A single token that follows such a
        call is one that was just written: the prompt has decided.
        """
        (n, T), there = ids.shape, length(past)
        if self.offsets is not None:
            back = torch.tensor([-1 if o is None else o for o in self.offsets], device=ids.device)
            self.told, self.offsets = torch.where(back < 0, NEVER, (there + T - back).clamp_min(0)), None
        if self.told is not None:
            return _repeated(self.told, n)[:, None]
        carried = ids.new_full((n, 1), NEVER)
        if (kept := notes(past).get(self.key)) is not None:
            kept = _repeated(kept.to(ids.device), n)[:, None]
            carried = torch.where(kept < there, kept, NEVER)  # the cache may have been cut shorter since
            if T == 1:
                return carried
        found = last(ids, self.tokens, begins)
        return torch.where(found == NEVER, carried, found + there)


def _repeated(start: Tensor, n: int) -> Tensor:
    if n % len(start):
        raise WeftError(f"an ALoRA was to begin in {len(start)} rows, and this call has {n}: it must be the same rows")
    return start.repeat_interleave(n // len(start))  # the beams of one row stand side by side


def last(ids: Tensor, tokens: Sequence[int], begins: Tensor | None = None) -> Tensor:
    """Where `tokens` occur last in each row of ids (n, T), or NEVER: (n, 1). With `begins` (1, T) bool, the tokens at which packed rows
    begin, the same for the row that each token belongs to: (1, T)."""
    n, T = ids.shape
    k = len(tokens)
    if k > T:
        return ids.new_full((n, 1), NEVER)
    hit = (ids.unfold(1, k, 1) == torch.tensor(tokens, device=ids.device)).all(-1)
    place = torch.arange(T - k + 1, device=ids.device)
    if begins is None:
        return torch.where(hit, place, NEVER).amax(1, keepdim=True)
    row = begins.cumsum(1)
    place = torch.where(hit & (row[:, : T - k + 1] == row[:, k - 1 :]), place, NEVER)  # within one row
    return ids.new_full((1, T + 1), NEVER).scatter_reduce(1, row[:, : T - k + 1], place, "amax").gather(1, row)


def notes(cache: Any) -> dict[str, Tensor]:
    """Where each adapter has begun, (n,) by its key. They lie with the cache's first layer, which every view of a cache shares and every
    copy copies."""
    if cache is None:
        return {}
    found: dict[str, Tensor] = (getattr(cache, "layers", None) or [cache])[0].__dict__.setdefault("weft_invoked", {})
    return found
