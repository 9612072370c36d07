"""The Triton kernel of `weft.kernels.linear_cross_entropy`, imported when it is needed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.launch import on_its_card


@triton.jit
def _slice(logits, targets, losses, vocabulary, IGNORED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    bears = target != IGNORED
    logits += row * vocabulary
    largest, total, at = float("-inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        at += tl.sum(tl.where(column == target, x, 0.0), 0)  # here and not by its address, which the loop below overwrites
        largest = larger
    lse = largest + tl.log(total)
    tl.store(losses + row, tl.where(bears, lse - at, 0.0))
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocabulary, other=0.0).to(tl.float32)
        d = tl.exp(x - lse) - tl.where(column == target, 1.0, 0.0)
        tl.store(logits + column, tl.where(bears, d, 0.0).to(logits.dtype.element_ty), mask=column < vocabulary)


@on_its_card
def slice_triton(logits: Tensor, targets: Tensor, ignored: int, block: int = 4096, warps: int = 8) -> tuple[Tensor, Tensor]:
    """(loss of a slice, its logits turned into their own gradient), one program a token; logits (n, V) contiguous."""
    n, vocabulary = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    grid: Any = (n,)
    _slice[grid](logits, targets, losses, vocabulary, IGNORED=ignored, BLOCK=block, num_warps=warps)
    return losses.sum(), logits
