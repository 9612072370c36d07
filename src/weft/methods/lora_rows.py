"""LoRA with an adapter for each row of a batch: one batched product for all rows, as in S-LoRA and Punica.

Row i meets its own A and B, padded with zeros to the largest rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.core import Mixture, Site
from weft.kernels.spans import add_spans


def mixed(mixture: Mixture, layer: Site, x: Tensor) -> Tensor:
    """y (rows, ..., out) for x (rows, ..., in), each row through its own plain LoRA."""
    rows, y = mixture.owners(x), layer.frozen(x)
    A, B = stacked(mixture, rows, y.dtype)
    S = torch.bmm(x.reshape(len(rows), -1, x.shape[-1]).to(y.dtype), A)
    gate = next((g for a in mixture.adapters if (g := getattr(a, "gate", None)) is not None), None)
    if gate is not None:  # activated ones begin at their invocations
        S = S.masked_fill(gate.before(y, gate.every).view(len(rows), -1, 1), 0)
    return torch.baddbmm(y.view(len(rows), -1, y.shape[-1]), S, B).view(y.shape)


def side_by_side(mixture: Mixture, layer: Site, x: Tensor) -> Tensor:
    """y (lines, ..., out) for x (lines, ..., in), where the owners have equally many neighbouring lines: one batched product for all.

    In training: two launches forward and four backward, however many adapters there are, and x and y are read and written once.
    """
    many: Any = [mixture.adapters[slot] for slot, *_ in mixture.spans]
    y: Tensor = layer.frozen(x)
    rank = -(-max(a.A.shape[0] for a in many) // 8) * 8  # rows of 16 bytes, which tensor cores want
    A = torch.stack([F.pad(a.A.to(y.dtype), (0, 0, 0, rank - a.A.shape[0])) for a in many])
    B = torch.stack([F.pad(a.B.to(y.dtype) * a.scale, (0, rank - a.B.shape[1])) for a in many])
    x = x.reshape(len(many), -1, x.shape[-1]).to(y.dtype)
    return add_spans(y.view(len(many), -1, y.shape[-1]), x, A, B).view(y.shape)


def stacked(mixture: Mixture, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, in, rank) and (rows, rank, out) with the scale in it; zeros for rows without adapter. Kept while no weight changes."""
    many: Any = mixture.adapters
    versions = None if torch.is_grad_enabled() else mixture.versions()
    key = (len(rows), dtype, versions)
    if versions is not None and mixture.cache.get("key") == key:
        return mixture.cache["stacks"]  # type: ignore[no-any-return]
    rank = max(a.A.shape[0] for a in many)
    A = torch.stack([F.pad(a.A.to(dtype), (0, 0, 0, rank - a.A.shape[0])) for a in many])
    B = torch.stack([F.pad(a.B.to(dtype) * a.scale, (0, rank - a.B.shape[1])) for a in many])
    owner = rows.clamp_min(0)
    stacks = A[owner].mT, (B[owner] * (rows >= 0).to(dtype)[:, None, None]).mT
    if versions is not None:
        mixture.cache.update(key=key, stacks=stacks)
    return stacks
