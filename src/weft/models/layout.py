"""Where the tokens of packed rows stand in padded blocks of rows of like length, for attention that knows no packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ALIKE = 0.7  # rows share a padded block when none is shorter than this share of the longest: at most 1.3 times the tokens, few launches


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed sequence stand in blocks of rows of like length.

    blocks: (rows, length) of each padded block; they lie behind each other in `size` places.
    place: (T,) int64, the place of token t.  size: number of places, padding included.
    """

    blocks: tuple[tuple[int, int], ...]
    place: Tensor
    size: int


def layout(lengths: Sequence[int], device: torch.device | str = "cpu") -> Layout:
    """Sort rows into padded blocks of like length. lengths: tokens of each row, in the order in which they are packed."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: list[list[int]] = []
    for row in sorted((r for r in range(len(lengths)) if lengths[r]), key=lambda r: -lengths[r]):
        if groups and lengths[row] >= ALIKE * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    place = torch.empty(starts[-1], dtype=torch.int64)
    blocks, offset = [], 0
    for group in groups:
        longest = lengths[group[0]]
        for i, row in enumerate(group):
            first = offset + i * longest
            place[starts[row] : starts[row + 1]] = torch.arange(first, first + lengths[row])
        blocks.append((len(group), longest))
        offset += len(group) * longest
    return Layout(tuple(blocks), place.to(device, non_blocking=True), offset)


_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # cu_seqlens -> Layout: made once a batch, not once a layer


def keep_layout(cu_seqlens: Tensor, lengths: Sequence[int]) -> None:
    """Make a batch's layout where its lengths are known."""
    if cu_seqlens not in _layouts:
        _layouts[cu_seqlens] = layout(lengths, cu_seqlens.device)


def layout_of(cu_seqlens: Tensor) -> Layout:
    """The layout of one batch. Reads cu_seqlens (a host sync on CUDA) unless `keep_layout` was given the lengths."""
    found = _layouts.get(cu_seqlens)
    if found is None:
        found = _layouts[cu_seqlens] = layout(cu_seqlens.diff().tolist(), cu_seqlens.device)
    return found
