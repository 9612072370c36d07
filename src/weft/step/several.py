"""One forward pass for several adapters at once: each has rows of its own in the batch, and a loss of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from weft.kernels.linear_cross_entropy import linear_cross_entropy
from weft.step.loss import Batch, _logits, _passing


def loss_sums(model: nn.Module, batch: Batch, counts: Sequence[int], head: nn.Linear | None = None) -> list[Tensor]:
    """The sum of the cross-entropies over each adapter's targets, () fp32 each, in nats.

    Args:
        batch: a padded batch; the first `counts[0]` rows are those of the first adapter, and so on. `weft.rows` must say the same.
        head: as for `loss_sum`.
    """
    if head is None:
        logits, targets = _logits(model, batch)
        rows = zip(logits.split(list(counts)), targets.split(list(counts)), strict=True)
        return [F.cross_entropy(x.flatten(0, -2).float(), t.flatten(), ignore_index=-100, reduction="sum") for x, t in rows]
    with _passing(head):
        hidden, targets = _logits(model, batch)
    rows = zip(hidden.split(list(counts)), targets.split(list(counts)), strict=True)
    return [linear_cross_entropy(h.flatten(0, -2), head.weight, t.flatten(), head.bias) for h, t in rows]
