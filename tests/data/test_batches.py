"""Every row once an epoch, a pure function of seed and epoch, within the budget, targets never across rows."""

from __future__ import annotations

from itertools import accumulate, chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core import WeftError
from weft.data import Batches, Example, join, pack, pad
from weft.data.batches import filled


def examples(lengths, seed=0):
    """Rows whose ids name them: row i holds i * 1000, i * 1000 + 1, ..."""
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(lengths):
        bears = rng.random(n) < 0.5
        bears[0], bears[-1] = False, n > 1
        made.append(Example((i * 1000 + np.arange(n)).astype(np.int32), bears, i))
    return made


def rows_of(batch):
    """(ids, targets) of each row of a batch."""
    if batch.cu_seqlens is not None:
        edges = batch.cu_seqlens.tolist()
        return [(batch.input_ids[0, a:b], batch.targets[0, a:b]) for a, b in pairwise(edges)]
    return [(batch.input_ids[i, : int(m.sum())], batch.targets[i, : int(m.sum())]) for i, m in enumerate(batch.attention_mask)]


def right_padded(batch):
    """Padding stands at the right alone: steps that leave the mask out lean on it."""
    there = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
    return torch.equal(batch.attention_mask, there.long()) and not (batch.targets[~there] >= 0).any()


lengths = st.lists(st.integers(2, 60), min_size=1, max_size=80)


@settings(max_examples=80, deadline=None)
@given(lengths, st.booleans(), st.integers(60, 200), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch(lengths, packing, tokens, seed, k):
    rows = examples(lengths)
    batches = Batches(rows, tokens, packing, seed)
    epoch = batches.epoch(k)
    assert len(epoch) == len(batches) == len(list(epoch))
    seen = []
    for batch in epoch:
        assert batch.input_ids.numel() <= tokens
        assert batch.n_targets == int((batch.targets >= 0).sum()) and batch.n_tokens == sum(batch.lengths)
        assert torch.equal(batch.keep, (batch.targets >= 0).any(0).nonzero()[:, 0])
        assert packing or right_padded(batch)
        for (ids, targets), n in zip(rows_of(batch), batch.lengths, strict=True):
            row = rows[int(ids[0]) // 1000]
            seen.append(row.row)
            assert ids.tolist() == row.ids.tolist() and len(ids) == n
            want = [int(row.ids[t + 1]) if row.bears[t + 1] else -100 for t in range(n - 1)] + [-100]
            assert targets.tolist() == want
        positions = [list(range(n)) for n in batch.lengths] if packing else [list(range(batch.input_ids.shape[1]))] * len(batch.lengths)
        assert batch.position_ids.flatten().tolist() == list(chain(*positions))
    assert sorted(seen) == list(range(len(rows)))
    again = Batches(rows, tokens, packing, seed)
    again.epoch(k + 1)  # whatever was asked for before
    assert again.epoch(k).plan == epoch.plan


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_and_seeds_differ_and_so_do_the_companies_that_rows_keep(packing):
    rows = examples(np.random.default_rng(1).integers(5, 60, 300))
    batches = Batches(rows, 256, packing, seed=0)
    together = [{frozenset(rows) for rows in batches.epoch(k).plan} for k in range(2)]
    assert len(together[0] & together[1]) < len(batches) / 10
    assert Batches(rows, 256, packing, seed=1).epoch(0).plan != batches.epoch(0).plan


def test_little_is_wasted():
    lengths = np.random.default_rng(2).lognormal(4, 0.7, 2000).astype(int).clip(2, 1000)
    packed, padded = (Batches(examples(lengths), 2048, packing, seed=0) for packing in (True, False))
    assert packed.fill > 0.97 and packed.padding == 0.0
    assert padded.padding < 0.08
    assert "packed, 9" in packed.describe() and "% padding, " in padded.describe()
    sizes = [batch.n_tokens for batch in packed.epoch(0)]
    assert min(sizes) > 0.9 * max(sizes)  # steps take about the same time


def test_rows_that_fill_a_batch_alone():
    batches = Batches(examples([100] * 7 + [51] * 4 + [49] * 4), 100, True, seed=0)
    assert len(batches) == 11 and sorted(batch.n_tokens for batch in batches.epoch(3)) == [100] * 11


def test_a_batch_moves_whole():
    batch = pack(examples([3, 4])).to("meta")
    assert all(getattr(batch, name).is_meta for name in ("input_ids", "position_ids", "targets", "cu_seqlens", "keep"))
    assert batch.attention_mask is None and batch.n_tokens == 7 and batch.lengths == (3, 4)
    batch = pad(examples([3, 4]), pad_id=9)
    assert batch.cu_seqlens is None and batch.input_ids[0, 3] == 9 and batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_slices_of_an_epoch():
    epoch = Batches(examples([5] * 40), 20, True, seed=0).epoch(0)
    assert [b.input_ids.tolist() for b in epoch[7:]] == [epoch[i].input_ids.tolist() for i in range(7, 10)]
    with pytest.raises(IndexError):
        epoch[10]


def test_bad_budgets():
    with pytest.raises(WeftError) as caught:
        Batches(examples([10, 70, 65]), 64, True, seed=0)
    want = "a batch holds 64 tokens, but 2 rows are longer (up to 70): raise the tokens of a batch, or set data.max_length to 64"
    assert str(caught.value) == want
    with pytest.raises(WeftError, match="no examples"):
        Batches([], 64, True, seed=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4))
def test_joined_batches_are_padded_at_the_right(several):
    parts = [pad(examples(some)) for some in several]
    joined = join(parts, "abcd"[: len(parts)])
    assert right_padded(joined) and [joined.owners.count(x) for x in "abcd"][: len(parts)] == list(map(len, several))
    together = [row for part in parts for row in rows_of(part)]
    assert all(torch.equal(a, b) for x, y in zip(rows_of(joined), together, strict=True) for a, b in zip(x, y, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4), st.booleans())
def test_joined_packed_batches_lie_end_to_end(several, even):
    packed = [pack(examples(some)) for some in several]
    parts = [filled(p, p.input_ids.shape[1] + 7, 5) for p in packed] if even else packed
    joined = join(parts, "abcd"[: len(parts)])
    assert joined.cu_seqlens.tolist() == [0, *accumulate(joined.lengths)] and len(joined.owners) == len(joined.lengths)
    assert joined.cu_seqlens[-1] == joined.input_ids.shape[1] == joined.targets.shape[1] == joined.position_ids.shape[1]
    assert len(joined.lengths).bit_count() == 1
    spans = {x: sum(n for n, owner in zip(joined.lengths, joined.owners, strict=True) if owner == x) for x in joined.owners}
    assert list(spans.values()) == [p.input_ids.shape[1] for p in parts], "each owner's tokens are neighbours"
    assert torch.equal(joined.keep, (joined.targets[0] >= 0).nonzero().squeeze(1)) and joined.n_targets == len(joined.keep)
    starts = joined.cu_seqlens[:-1][torch.tensor(joined.lengths) > 0].long()
    assert (joined.position_ids[0, starts] == 0).all() and int((joined.position_ids == 0).sum()) == len(starts)
    own = [joined.input_ids[0, a : a + n].tolist() for a, n in zip(joined.cu_seqlens.tolist(), joined.lengths, strict=False)]
    for p in packed:
        assert all(p.input_ids[0, a : a + n].tolist() in own for a, n in zip(p.cu_seqlens.tolist(), p.lengths, strict=False))
