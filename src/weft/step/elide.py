"""What follows attention in the last layer, at tokens that bear loss alone: nobody reads what it makes of the others.

Its modules work token by token. They are given the tokens whose logits the loss asks for, and zeros stand where the others' results would;
the gradient that comes back for those is zero, as it is where all tokens are computed. Layers that are compiled are left as they are: the
last one would need a graph of its own, seconds of every start for 3% of a step of a billion parameters with two thirds masked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from weft.step.check import bounds
from weft.step.gated import touched
from weft.step.loss import Batch, forwards

logger = logging.getLogger("weft")
PLACES = ("self_attn.o_proj", "mlp")
TRIED, KEPT = 5, (1, 4)  # tokens of a trial, and those of them that are read


def tail(model: nn.Module, layers: Sequence[nn.Module], head: nn.Linear | None) -> list[nn.Module]:
    """The modules of the last layer that can be given fewer tokens; none where that cannot be shown.

    Found by trying: with NaN for every token that is not read, those that are come out as they do without.
    """
    if not layers or getattr(model, "plan", None) is not None:  # an adapter of the whole model may go by where tokens stand
        return []
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return []  # what the model computes again it would compute of all tokens
    inside = dict(layers[-1].named_modules())
    found = [m for place in PLACES if (m := inside.get(place)) is not None and not touched(m)]
    try:
        why = _differs(model, found, head) if found else "its last layer has no such modules"
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        why = f"it fails when tried ({type(error).__name__}: {error})"
    if why:
        logger.info("the last layer of %s computes all tokens: %s", type(model).__name__, why)
    return [] if why else found


def _differs(model: nn.Module, modules: list[nn.Module], head: nn.Linear | None) -> str:
    device = next(model.parameters()).device
    ids, keep = torch.arange(TRIED, device=device)[None], torch.tensor(KEPT, device=device)
    with forwards(model, head) as forward:
        whole = forward(ids).index_select(1, keep).float()
        with _only(modules, keep, TRIED, torch.nan):
            some = forward(ids).index_select(1, keep).float()
    apart, largest = float((some - whole).abs().max()), float(whole.abs().max())
    within = apart <= (1e-4 if bounds(model, False)[0] == "fp32" else 3e-2) * largest
    return "" if within else f"tokens that are read come out differently (by {apart:.2g}, largest {largest:.2g})"


@contextmanager
def only(modules: Sequence[nn.Module], batch: Batch) -> Iterator[None]:
    """Within it these modules work on the tokens of this batch that bear loss."""
    length = batch.input_ids.shape[1]
    if not modules or batch.owners or batch.keep is None or len(batch.keep) == length:
        yield
        return
    with _only(modules, batch.keep, length, 0.0):
        yield


@contextmanager
def _only(modules: Sequence[nn.Module], keep: Tensor, length: int, others: float) -> Iterator[None]:
    """keep: (C,), the tokens of rows of this length that are computed; others: what stands for the rest."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = type(self).forward
        if args or kwargs or x.dim() != 3 or x.shape[1] != length:
            return own(self, x, *args, **kwargs)
        some = own(self, x.index_select(1, keep))
        return some.new_full((*x.shape[:2], some.shape[2]), others).index_copy(1, keep, some)

    for m in modules:
        m.forward = MethodType(forward, m)
    try:
        yield
    finally:
        for m in modules:
            del m.forward
