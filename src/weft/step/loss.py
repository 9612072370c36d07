"""The loss of one batch: the sum of cross-entropies over the tokens that bear loss.

A sum, not a mean: over gradient accumulation and several processes the one right normaliser is the number of tokens that bear loss in
the whole step, which the loop knows (`batch.n_targets`) before the first forward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core import FAILS, WeftError
from weft.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sliced
from weft.models import attention
from weft.step.check import bounds

logger = logging.getLogger("weft")
PLACES = 9  # of the rows by which `unmaskable` tries a model


class Batch(Protocol):
    """What is read of a `weft.data.Batch`."""

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    keep: Tensor | None
    lengths: tuple[int, ...]
    owners: tuple[str, ...]


def loss_sum(model: nn.Module, batch: Batch, head: nn.Linear | None = None, plain: bool = False, unmasked: bool = False) -> Tensor:
    """Sum of the cross-entropies over the batch's targets; a scalar in fp32 (fp64 if the logits are), in nats.

    model: a transformers causal language model, or any module with `model(input_ids)` -> logits (n, T, V) or an object with `.logits`.
    A packed batch needs `weft.models.attention.use(model)` to have said True; else WeftError.
    Where the model's forward takes `logits_to_keep`, its head runs only at positions that have a target.
    head: the model's frozen output head, when `fusible` found that logits are what it returns and nothing else: then the logits are
    never formed (`weft.kernels.linear_cross_entropy`).  plain: by that operation's reference.
    unmasked: leave out the attention mask of a padded batch, where `unmaskable` found that it changes nothing.
    """
    return loss_sums(model, batch, None, head, plain, unmasked)[0]


def loss_sums(
    model: nn.Module, batch: Batch, counts: Sequence[int] | None, head: nn.Linear | None = None, plain: bool = False, unmasked: bool = False
) -> list[Tensor]:
    """The same for several owners of rows, each a sum of its own: the first `counts[0]` rows are those of the first owner, and so on.

    Of a packed batch, the first `counts[0]` tokens that have a target. None: all are one owner's.
    """
    dim = 0 if batch.cu_seqlens is None else 1
    if head is None or not _bare(model, head):  # as it is now
        logits, targets = _logits(model, batch, unmasked)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        pairs = zip(_split(logits, counts, dim), _split(targets, counts, dim), strict=True)
        return [F.cross_entropy(x.flatten(0, -2), t.flatten(), ignore_index=-100, reduction="sum") for x, t in pairs]
    with _passing(head):
        hidden, targets = _logits(model, batch, unmasked)
    work = linear_cross_entropy_sliced if plain else linear_cross_entropy
    pairs = zip(_split(hidden, counts, dim), _split(targets, counts, dim), strict=True)
    return [work(h.flatten(0, -2), head.weight, t.flatten(), head.bias) for h, t in pairs]


def _split(t: Tensor, counts: Sequence[int] | None, dim: int) -> Sequence[Tensor]:
    return (t,) if counts is None else t.split(list(counts), dim)


def fusible(model: nn.Module) -> nn.Linear | None:
    """The output head, if the model's logits are exactly what it returns: no adapter on it, not trained, no softcap or scale behind it.

    Found by trying: with a head that hands its input on, the model must return that very tensor.
    """
    head = _head(model)
    if not isinstance(head, nn.Linear) or head.weight.is_meta or not _bare(model, head):
        return None
    ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
    with _trying(model), _passing(head) as seen:
        out = _tensor(model(ids, **_uncached(model)))
    return head if len(seen) == 1 and out is seen[0] else None


def _head(model: nn.Module) -> Any:
    find = getattr(_inner(model), "get_output_embeddings", None)
    return find() if find is not None else None


def _bare(model: nn.Module, head: nn.Linear) -> bool:
    """Whether it is the model's head, with nothing on it that would be passed by, and frozen numbers."""
    bare = getattr(head, "plan", None) is None and not (head._forward_hooks or head._forward_pre_hooks)
    numbers = head.weight.is_floating_point() and not head.weight.requires_grad
    return bare and numbers and _head(model) is head


def tried(model: nn.Module) -> None:
    """One pass over two tokens, for whoever watches."""
    with _trying(model):
        model(torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device), **_uncached(model))


def unmaskable(model: nn.Module, batch: Batch, head: nn.Linear | None = None) -> bool:
    """Whether batches like this padded one give the same without their attention mask.

    They do where attention is causal: a token never looks right, which is where padding is, and padding bears no loss. The mask is not
    free: with one, SDPA has no use of its fastest kernels and for grouped heads, and a (T, T) mask is made for every row.

    Found by trying, with the batch's first tokens in rows of 8, 5 and 2 and padding behind: real tokens must come out alike with the mask
    and without (within `attention.APART` of the largest number), and other padding must not reach them. Three forward passes of 9 tokens
    a row, none where there is no mask; uses no random numbers; modes are restored.  head: as `fusible` found it.
    """
    mask = batch.attention_mask
    if mask is None or "attention_mask" not in accepts(model):
        return False
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        why = "the batch has padding before its tokens"
    else:
        try:
            why = _needs_mask(model, batch.input_ids, head)
        except FAILS as error:
            why = f"it fails when tried ({type(error).__name__}: {error})"
    if why:
        logger.info("%s keeps the attention mask of padded rows: %s", type(_inner(model)).__name__, why)
    return not why


def _needs_mask(model: nn.Module, some: Tensor, head: nn.Linear | None) -> str:
    """Why the mask cannot be left out, or nothing. some: (n, T) any tokens; the trial has n rows or a multiple, as `weft.rows` wants it."""
    places = torch.arange(PLACES, device=some.device)
    ids = some[:, places % some.shape[1]].repeat_interleave(-(-3 // len(some)), 0)
    there = places < torch.tensor([8, 5, 2], device=some.device).repeat(len(ids))[: len(ids), None]
    other = max(int(ids.max()), 1)

    def real(padding: int, **mask: Tensor) -> Tensor:
        return _tensor(model(torch.where(there, ids, padding), **mask, **_uncached(model)))[there].float()

    with _trying(model), nullcontext() if head is None else _passing(head):
        masked, bare, changed = real(0, attention_mask=there.long()), real(0), real(other)
    largest = float(masked.abs().max())
    kind = bounds(model, False)[0]
    apart, leak = float((bare - masked).abs().max()), float((changed - bare).abs().max())
    if not apart <= attention.APART[kind] * largest:
        return f"without it real tokens come out differently (by {apart:.2g}, largest {largest:.2g})"
    if not leak <= attention.LEAK[kind] * largest:
        return f"without it padding reaches real tokens (by {leak:.2g}, largest {largest:.2g})"
    return ""


@contextmanager
def forwards(model: nn.Module, head: nn.Linear | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it: token ids (n, T) -> logits (n, T, V), or what the head would make them of; for trials, as `_trying` has it."""
    with _trying(model), nullcontext() if head is None else _passing(head):
        yield lambda ids: _tensor(model(ids, **_uncached(model)))


@contextmanager
def _trying(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; afterwards each module in the mode it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _passing(head: nn.Module) -> Iterator[list[Tensor]]:
    """The head hands on what it is given; the list holds it."""
    seen: list[Tensor] = []

    def hand_on(h: Tensor) -> Tensor:
        seen.append(h)
        return h

    head._compiled_call_impl = hand_on
    try:
        yield seen
    finally:
        head._compiled_call_impl = None


def _uncached(model: nn.Module) -> dict[str, Any]:
    """A cache costs memory, and its presence turns transformers' own detection of packing off."""
    return {"use_cache": False} if "use_cache" in accepts(model) else {}


def _logits(model: nn.Module, batch: Batch, unmasked: bool) -> tuple[Tensor, Tensor]:
    """Logits (n, C, V) and targets (n, C) at the positions that matter (all of them where the model gives no choice)."""
    takes = accepts(model)
    kwargs = _uncached(model)
    if batch.cu_seqlens is not None:
        _ready_for_packing(model)
        kwargs |= attention.packed_kwargs(batch.cu_seqlens, batch.lengths)
        kwargs["position_ids"] = batch.position_ids
    elif batch.attention_mask is not None and not unmasked and "attention_mask" in takes:
        kwargs["attention_mask"] = batch.attention_mask
    elif "attention_mask" in takes and attention.maskless(_inner(model)):
        kwargs["attention_mask"] = attention.placeholder(batch.input_ids.device)
        if "position_ids" in takes:  # what the model would number from its mask
            kwargs["position_ids"] = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
    keep = batch.keep
    if keep is not None and "logits_to_keep" in takes:
        logits = _tensor(model(batch.input_ids, logits_to_keep=keep, **kwargs))
        return logits, batch.targets.index_select(1, keep)
    logits = _tensor(model(batch.input_ids, **kwargs))
    if keep is not None and batch.targets.shape[0] == 1:
        return logits.index_select(1, keep), batch.targets.index_select(1, keep)
    return logits, batch.targets


def _tensor(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise WeftError(f"the model must return logits, or an object with .logits; it returned {type(output).__name__}")
    return logits


def _inner(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's or DDP's wrapper."""
    while True:
        inside = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def _ready_for_packing(model: nn.Module) -> None:
    inner = _inner(model)
    if not attention.installed(inner):
        why = attention.reason(inner)
        raise WeftError(
            f"{type(inner).__name__} got a packed batch but keeps its own attention, so rows would see each other"
            + (f" ({why})" if why else "")
            + "; call weft.models.attention.use(model) first, and where it says False set data.packing to false"
        )


_accepted: WeakKeyDictionary[nn.Module, tuple[type, frozenset[str]]] = WeakKeyDictionary()


def accepts(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's forward declares; looked up once a model and class."""
    known = _accepted.get(model)
    if known is None or known[0] is not type(model):
        known = _accepted[model] = (type(model), _declared(_inner(model)))
    return known[1]


def _declared(model: nn.Module) -> frozenset[str]:
    """A site's own forward takes anything and hands it on; the first class behind it that names its arguments tells them."""
    found = [vars(model)["forward"]] if "forward" in vars(model) else []
    found += [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    any_kind = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for forward in found:
        names = frozenset(p.name for p in inspect.signature(forward).parameters.values() if p.kind not in any_kind and p.name != "self")
        if names:
            return names
    return frozenset()
