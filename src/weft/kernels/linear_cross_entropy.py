"""Cross-entropy of a linear head, Σ_t logsumexp(W h_t) - (W h_t)[target_t], without ever holding all logits.

For a vocabulary of 128 thousand and 8192 tokens the logits are 4 GB in fp32, and their gradient as much again. The head is frozen, so
the only gradient is that of h, and it is known as soon as a token's logits are: dh = Wᵀ(softmax(Wh) - e_target). So a slice of tokens
at a time is multiplied, turned into its gradient in place, multiplied back, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from weft.kernels.launch import kernels, usable
from weft.kernels.scratch import real

IGNORED = -100  # the target of a token that bears no loss


def linear_cross_entropy_reference(h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with all logits at once; differentiable in everything."""
    logits = F.linear(h, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy_sliced(h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, rows: int = 512) -> Tensor:
    """The reference a slice of tokens at a time, each slice's logits made again in the backward pass: for short memory."""
    parts = zip(h.split(rows), targets.split(rows), strict=True)
    sums = [checkpoint(linear_cross_entropy_reference, part, weight, t, bias, use_reentrant=False) for part, t in parts]
    return torch.stack(sums).sum()


def _slice(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss of a slice, () fp32; gradient of its logits in their dtype). logits (n, V), targets (n,)."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    bears = targets != IGNORED
    at = targets.clamp_min(0)[:, None]
    lse = torch.logsumexp(wide, 1, keepdim=True)
    loss = ((lse - wide.gather(1, at)).squeeze(1) * bears).sum()
    hit = torch.arange(logits.shape[1], device=logits.device)[None] == at
    return loss, (((wide - lse).exp() - hit.to(wide.dtype)) * bears[:, None]).to(logits.dtype)


def _slice_in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in eager mode: two passes over fp32 logits that nobody else needs, instead of six temporaries."""
    wide = logits.float()
    bears = targets != IGNORED
    at = targets.clamp_min(0)[:, None]
    lse = torch.logsumexp(wide, 1, keepdim=True)
    loss = ((lse - wide.gather(1, at)).squeeze(1) * bears).sum()
    wide.sub_(lse).exp_()
    wide.scatter_add_(1, at, torch.full_like(lse, -1.0))
    return loss, wide.mul_(bears[:, None]).to(logits.dtype)


def _way(h: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What turns logits into their gradient: one kernel on a card, few passes on a CPU."""
    if h.dtype == torch.float64 or not real(h):
        return _slice
    return partial(kernels("triton_cross_entropy").slice_triton, ignored=IGNORED) if usable(h) else _slice_in_place


def slice_rows(vocabulary: int, cuda: bool) -> int:
    """Tokens a slice: 256 MB of 16-bit logits on a GPU (a product of full efficiency), what stays in the cache on a CPU."""
    return max(128, (2**27 if cuda else 2**20) // vocabulary // 128 * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        work = _way(h)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        for start in range(0, h.shape[0], rows):
            part = slice(start, start + rows)
            sliced, dlogits = work(F.linear(h[part], weight, bias), targets[part])
            loss += sliced
            if dh is not None:
                torch.mm(dlogits, weight, out=dh[part])
            del dlogits  # before the next slice's logits come
        ctx.save_for_backward(dh)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (dh,) = ctx.saved_tensors
        return None if dh is None else dh * g.to(dh.dtype), None, None, None, None


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, rows: int | None = None) -> Tensor:
    """Sum of the cross-entropies; a scalar in fp32 (fp64 where h is).

    Args:
        h: (n, d), what the head is given. weight: (V, d), frozen. targets: (n,) int64, -100 for a token that bears no loss.
        bias: (V,) or None, frozen. rows: tokens a slice; None: `slice_rows`.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return linear_cross_entropy_reference(h, weight, targets, bias)
    rows = rows or slice_rows(weight.shape[0], h.is_cuda)
    return _LinearCrossEntropy.apply(h, weight, targets, bias, rows)  # type: ignore[no-any-return, no-untyped-call]
