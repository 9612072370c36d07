"""Batches of rows, packed or padded, as a pure function of (examples, seed, epoch)."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
from torch import Tensor

from weft.core import WeftError
from weft.data.encode import Example
from weft.kernels.hadamard import power_of_two

MIX = 0.15  # packed: rows change places with others of up to about this much more or less length, so that batches differ by epoch
SLACK = 0.1  # padded: the same, and the share of the budget that is left free for it


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model. n: sequences, T: tokens of each.

    input_ids, position_ids: (n, T) int64.
    targets: (n, T) int64; the token after t if it bears loss, else -100. Shifted already, and never across rows.
    attention_mask: (n, T) int64, 1 for a token and 0 for padding, which is at the right alone; or None when packed.
    cu_seqlens: (rows + 1,) int32, where each row begins, and T; None when not packed. Packed: n == 1, position_ids restart at every row.
    n_targets: tokens that bear loss.  n_tokens: tokens that are not padding.
    keep: (C,) int64, the positions t at which any row has a target: the head need not run for others. None: unknown.
    lengths: tokens of each row, on the host.
    owners: the adapter that each row trains, where several train at once; else none.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    n_targets: int
    n_tokens: int
    keep: Tensor | None = None
    lengths: tuple[int, ...] = ()
    owners: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device. To a card by way of pinned memory, so that the host does not wait for the card."""
        pinned = torch.device(device).type == "cuda"
        moved = {
            name: (value.pin_memory() if pinned and not value.is_cuda else value).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "targets", "attention_mask", "cu_seqlens", "keep")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def pack(examples: Sequence[Example]) -> Batch:
    """Lay rows end to end: (1, T)."""
    lengths = [len(example) for example in examples]
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    targets = np.concatenate([_targets(example) for example in examples])
    keep = np.flatnonzero(targets >= 0)
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]))[None],
        targets=torch.from_numpy(targets)[None],
        attention_mask=None,
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        n_targets=len(keep),
        n_tokens=len(ids),
        keep=torch.from_numpy(keep),
        lengths=tuple(lengths),
    )


def filled(batch: Batch, tokens: int, longest: int) -> Batch:
    """A packed batch in the shape (1, tokens), for a compiler that wants one shape.

    What is missing are rows of zeros, of at most `longest` tokens each, that bear no loss, and empty rows up to a power of two of them.
    """
    missing = tokens - batch.input_ids.shape[1]
    fillers = [longest] * (missing // longest) + [missing % longest] * (missing % longest > 0)
    lengths = [*batch.lengths, *fillers]
    lengths += [0] * (power_of_two(len(lengths)) - len(lengths))
    places = torch.cat([torch.arange(n) for n in fillers]) if fillers else torch.empty(0, dtype=torch.int64)
    pad = torch.nn.functional.pad
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, missing)),
        position_ids=torch.cat([batch.position_ids, places[None]], 1),
        targets=pad(batch.targets, (0, missing), value=-100),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        lengths=tuple(lengths),
    )


def pad(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Rows one below the other, filled up at the right: (n, T)."""
    lengths = [len(example) for example in examples]
    shape = (len(examples), max(lengths))
    ids, targets, mask = np.full(shape, pad_id, dtype=np.int64), np.full(shape, -100, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, example in enumerate(examples):
        ids[i, : lengths[i]], targets[i, : lengths[i]], mask[i, : lengths[i]] = example.ids, _targets(example), 1
    there = targets >= 0
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(shape[1]).expand(shape).contiguous(),
        targets=torch.from_numpy(targets),
        attention_mask=torch.from_numpy(mask),
        cu_seqlens=None,
        n_targets=int(there.sum()),
        n_tokens=sum(lengths),
        keep=torch.from_numpy(np.flatnonzero(there.any(axis=0))),
        lengths=tuple(lengths),
    )


def join(batches: Sequence[Batch], owners: Sequence[str], pad_id: int = 0) -> Batch:
    """The batches of several adapters in one: packed ones end to end, padded ones one below the other and filled up to the longest row."""
    if all(b.cu_seqlens is not None for b in batches):
        return _end_to_end(batches, owners)
    width = max(b.input_ids.shape[1] for b in batches)

    def filled(name: str, value: int) -> Tensor:
        parts = [getattr(b, name) for b in batches]
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in parts])

    ids, targets = filled("input_ids", pad_id), filled("targets", -100)
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(width).expand(ids.shape).contiguous(),
        targets=targets,
        attention_mask=filled("attention_mask", 0),
        cu_seqlens=None,
        n_targets=sum(b.n_targets for b in batches),
        n_tokens=sum(b.n_tokens for b in batches),
        keep=(targets >= 0).any(0).nonzero().squeeze(1),
        lengths=tuple(n for b in batches for n in b.lengths),
        owners=tuple(name for b, name in zip(batches, owners, strict=True) for _ in range(b.input_ids.shape[0])),
    )


def _end_to_end(batches: Sequence[Batch], owners: Sequence[str]) -> Batch:
    """With empty rows at the end alone, up to a power of two of rows, so that a compiler meets few shapes of cu_seqlens."""
    rows = [(n, name) for b, name in zip(batches, owners, strict=True) for n in b.lengths if n]
    rows += [(0, rows[-1][1])] * (power_of_two(len(rows)) - len(rows))
    lengths = tuple(n for n, _ in rows)
    starts = np.cumsum([0, *(b.input_ids.shape[1] for b in batches)]).tolist()
    keeps = [b.keep + start for b, start in zip(batches, starts, strict=False) if b.keep is not None]
    return Batch(
        input_ids=torch.cat([b.input_ids for b in batches], 1),
        position_ids=torch.cat([b.position_ids for b in batches], 1),
        targets=torch.cat([b.targets for b in batches], 1),
        attention_mask=None,
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        n_targets=sum(b.n_targets for b in batches),
        n_tokens=sum(b.n_tokens for b in batches),
        keep=torch.cat(keeps) if len(keeps) == len(batches) else None,
        lengths=lengths,
        owners=tuple(name for _, name in rows),
    )


def _targets(example: Example) -> np.ndarray:
    targets = np.full(len(example), -100, dtype=np.int64)
    targets[:-1] = np.where(example.bears[1:], example.ids[1:], -100)
    return targets


class Epoch(Sequence[Batch]):
    """The batches of one epoch, each made when asked for."""

    def __init__(self, batches: Batches, plan: list[list[int]]) -> None:
        self.batches, self.plan = batches, plan

    def __len__(self) -> int:
        return len(self.plan)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Epoch: ...
    def __getitem__(self, index: int | slice) -> Batch | Epoch:
        if isinstance(index, slice):
            return Epoch(self.batches, self.plan[index])
        owner = self.batches
        rows = [owner.examples[i] for i in self.plan[index]]
        if not owner.packing:
            return pad(rows, owner.pad_id)
        return filled(pack(rows), owner.tokens, int(owner.lengths.max())) if owner.even else pack(rows)


class Batches:
    """All examples once an epoch, in batches of at most `tokens` tokens (padding included).

    `epoch(k)` depends on (examples, tokens, packing, seed, k) alone, so a run resumes at (epoch, index). Every epoch has the same number
    of batches. Packed batches hold about the same number of tokens each; padded ones hold rows of like length.

    Raises WeftError if a row is longer than `tokens`.
    """

    def __init__(self, examples: Sequence[Example], tokens: int, packing: bool, seed: int, pad_id: int = 0) -> None:
        if not examples:
            raise WeftError("there are no examples to make batches of")
        self.examples, self.tokens, self.packing, self.seed, self.pad_id = examples, tokens, packing, seed, pad_id
        self.lengths = np.array([len(example) for example in examples], dtype=np.int64)
        longest = int(self.lengths.max())
        if longest > tokens:
            count = int((self.lengths > tokens).sum())
            rows = "1 row is" if count == 1 else f"{count} rows are"
            what = f"a batch holds {tokens} tokens, but {rows} longer (up to {longest})"
            raise WeftError(f"{what}: raise the tokens of a batch, or set data.max_length to {tokens}")
        down = np.sort(self.lengths)[::-1]
        if packing:
            self._bins, self._best_fit = _bins_needed(down.tolist(), tokens)
        else:
            self._sizes = _padded_sizes(down.tolist(), int(tokens / (1 + SLACK)))
        self.even = False  # packed: fill every batch up to one shape
        self._made: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        return self._bins if self.packing else len(self._sizes)

    def epoch(self, k: int) -> Epoch:
        """The batches of epoch k (0, 1, ...)."""
        if self._made is None or self._made[0] != k:
            rng = np.random.default_rng([self.seed, k])
            plan = self._packed(rng) if self.packing else self._padded(rng)
            self._made = (k, [plan[i] for i in rng.permutation(len(plan))])
        return Epoch(self, self._made[1])

    @property
    def padding(self) -> float:
        """Share of computed tokens that are padding, 0 to 1 (epoch 0)."""
        if self.packing:
            return 0.0
        computed = sum(len(rows) * int(self.lengths[rows].max()) for rows in self.epoch(0).plan)
        return 1.0 - float(self.lengths.sum()) / computed

    @property
    def fill(self) -> float:
        """Share of the token budget that real tokens use, 0 to 1."""
        return float(self.lengths.sum()) / (len(self) * self.tokens)

    def describe(self) -> str:
        """One line for the user."""
        how = "packed" if self.packing else f"padded, {self.padding:.1%} padding"
        count = "1 batch" if len(self) == 1 else f"{len(self):,} batches"
        return f"{count} an epoch, {how}, {self.fill:.1%} of {self.tokens:,} tokens used"

    def _packed(self, rng: np.random.Generator) -> list[list[int]]:
        shuffled = rng.permutation(len(self.examples))
        for mix in (MIX, MIX / 3, MIX / 9, 0.0):  # with 0 the lengths alone decide, and those are known to fit
            noise = rng.uniform(1.0, 1.0 + mix, len(shuffled))
            order = shuffled[np.argsort(-self.lengths[shuffled] * noise, kind="stable")]
            if self._best_fit:
                plan = _best_fit(order.tolist(), self.lengths.tolist(), self.tokens)
                if len(plan) == self._bins:
                    break
            elif (spread := _spread(order.tolist(), self.lengths.tolist(), self.tokens, self._bins)) is not None:
                plan = spread
                break
        return [[rows[i] for i in rng.permutation(len(rows))] for rows in plan]

    def _padded(self, rng: np.random.Generator) -> list[list[int]]:
        # Sorted by length times 1 to 1 + SLACK, the row at any place is at most 1 + SLACK times as long as the one that stands there by
        # length alone; the sizes leave that much room, so every batch fits in every epoch.
        shuffled = rng.permutation(len(self.examples))
        noise = rng.uniform(1.0, 1.0 + SLACK, len(shuffled))
        order = shuffled[np.argsort(-self.lengths[shuffled] * noise, kind="stable")].tolist()
        plan, start = [], 0
        for size in self._sizes:
            plan.append(order[start : start + size])
            start += size
        return plan


def _spread(order: Sequence[int], lengths: Sequence[int], tokens: int, bins: int) -> list[list[int]] | None:
    """Each row, longest first, into the emptiest bin: bins of equal load, each with long and short rows. None if one overflows."""
    heap = [(0, i) for i in range(bins)]
    plan: list[list[int]] = [[] for _ in range(bins)]
    for row in order:
        load, i = heap[0]
        if load + lengths[row] > tokens:
            return None
        plan[i].append(row)
        heapq.heapreplace(heap, (load + lengths[row], i))
    return plan


def _best_fit(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Each row, longest first, into the fullest bin that it fits; a new bin if none."""
    free: list[tuple[int, int]] = []  # (tokens free, bin), sorted
    plan: list[list[int]] = []
    for row in order:
        at = bisect_left(free, (lengths[row], -1))
        if at == len(free):
            plan.append([row])
            room, i = tokens, len(plan) - 1
        else:
            room, i = free.pop(at)
            plan[i].append(row)
        insort(free, (room - lengths[row], i))
    return plan


def _bins_needed(down: list[int], tokens: int) -> tuple[int, bool]:
    """(number of bins, whether best fit is needed to reach it), from the lengths alone, so that it is the same in every epoch."""
    rows = range(len(down))
    least, most = -(-sum(down) // tokens), len(_best_fit(rows, down, tokens))
    for bins in sorted({least + round((most - least) * i / 4) for i in range(5)}):
        if _spread(rows, down, tokens, bins) is not None:
            return bins, False
    return most, True


def _padded_sizes(down: list[int], tokens: int) -> list[int]:
    """How many rows each batch takes, longest rows first."""
    sizes, start = [], 0
    while start < len(down):
        size = min(max(1, tokens // down[start]), len(down) - start)
        sizes.append(size)
        start += size
    return sizes
