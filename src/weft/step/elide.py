"""What follows attention in the last layer, at tokens that bear loss alone: nobody reads what it makes of the others.

Its modules work token by token. They are given the tokens whose logits the loss asks for, and zeros stand where the others' results would;
the gradient that comes back for those is zero, as it is where all tokens are computed. Layers that are compiled are left as they are: the
last one would need a graph of its own, seconds of every start for 3% of a step of a billion parameters with two thirds masked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import FAILS, modules
from weft.models import attention
from weft.step.check import bounds, recomputes, stirred
from weft.step.gated import touched
from weft.step.loss import Batch, forwards

logger = logging.getLogger("weft")
PLACES = ("self_attn.o_proj", "mlp")
TRIED, KEPT = 5, (1, 4)  # tokens of a trial, and those of them that are read


def tail(
    model: nn.Module, layers: Sequence[nn.Module], head: nn.Linear | None, parameters: Mapping[str, nn.Parameter]
) -> list[nn.Module]:
    """The modules of the last layer that can be given fewer tokens; none where that cannot be shown.

    Found by trying: with NaN for every token that is not read, those that are come out as they do without.
    parameters: what is trained; adapters that start as the identity would hide what they will do, so they are stirred meanwhile.
    """
    if not layers or getattr(model, "plan", None) is not None:  # an adapter of the whole model may go by where tokens stand
        return []
    if recomputes(model):
        return []  # what the model computes again it would compute of all tokens
    inside = dict(layers[-1].named_modules())
    found = [m for place in PLACES if (m := inside.get(place)) is not None and _free(m)]
    try:
        why = _differs(model, found, head, parameters) if found else "its last layer has no such modules"
    except FAILS as error:
        why = f"it fails when tried ({type(error).__name__}: {error})"
    if why:
        logger.info("the last layer of %s computes all tokens: %s", type(model).__name__, why)
    return [] if why else found


def _free(module: nn.Module) -> bool:
    """Whether nobody has hooked it, or what is in it: a hook wants all tokens."""
    return not any(touched(m) for _, m in modules(module))


def _differs(model: nn.Module, found: list[nn.Module], head: nn.Linear | None, parameters: Mapping[str, nn.Parameter]) -> str:
    device = next(model.parameters()).device
    ids, keep = torch.arange(TRIED, device=device)[None], torch.tensor(KEPT, device=device)
    with stirred(parameters, device), forwards(model, head) as forward:
        whole = forward(ids).index_select(1, keep).float()
        with _only(found, keep, TRIED, torch.nan):
            changed = forward(ids).float()
    unread = torch.ones(TRIED, dtype=torch.bool, device=device).index_fill(0, keep, False)
    if not changed[:, unread].isnan().all():
        return "what its modules make does not reach the logits"
    some = changed.index_select(1, keep)
    apart, largest = float((some - whole).abs().max()), float(whole.abs().max())
    within = apart <= attention.APART[bounds(model, False)[0]] * largest
    return "" if within else f"tokens that are read come out differently (by {apart:.2g}, largest {largest:.2g})"


def masked(batch: Batch) -> bool:
    """Whether it has places at which no row bears loss. Rows of several owners count as whole: `losses` elides nothing."""
    return not batch.owners and batch.keep is not None and len(batch.keep) < batch.input_ids.shape[1]


@contextmanager
def only(found: Sequence[nn.Module], batch: Batch) -> Iterator[None]:
    """Within it these modules work on the tokens of this batch that bear loss, but for those that somebody has hooked since."""
    if not found or batch.keep is None or not masked(batch):
        yield
        return
    with _only([m for m in found if _free(m)], batch.keep, batch.input_ids.shape[1], 0.0):
        yield


@contextmanager
def _only(found: Sequence[nn.Module], keep: Tensor, length: int, others: float) -> Iterator[None]:
    """keep: (C,), the tokens of rows of this length that are computed; others: what stands for the rest."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = type(self).forward
        if args or kwargs or x.dim() != 3 or x.shape[1] != length:
            return own(self, x, *args, **kwargs)
        some = own(self, x.index_select(1, keep))
        return some.new_full((*x.shape[:2], some.shape[2]), others).index_copy(1, keep, some)

    for m in found:
        m.forward = MethodType(forward, m)
    try:
        yield
    finally:
        for m in found:
            del m.forward
