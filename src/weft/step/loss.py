"""The loss of one batch: the sum of cross-entropies over the tokens that bear loss.

A sum, not a mean: over gradient accumulation and several processes the one right normaliser is the number of tokens that bear loss in
the whole step, which the loop knows (`batch.n_targets`) before the first forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core import WeftError
from weft.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sliced
from weft.models import attention


class Batch(Protocol):
    """What is read of a `weft.data.Batch`."""

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    keep: Tensor | None
    lengths: tuple[int, ...]


def loss_sum(model: nn.Module, batch: Batch, head: nn.Linear | None = None, plain: bool = False) -> Tensor:
    """Sum of the cross-entropies over the batch's targets; a scalar in fp32 (fp64 if the logits are), in nats.

    model: a transformers causal language model, or any module with `model(input_ids)` -> logits (n, T, V) or an object with `.logits`.
    A packed batch needs `weft.models.attention.use(model)` to have said True; else WeftError.
    Where the model's forward takes `logits_to_keep`, its head runs only at positions that have a target.
    head: the model's frozen output head, when `fusible` found that logits are what it returns and nothing else: then the logits are
    never formed (`weft.kernels.linear_cross_entropy`).  plain: by that operation's reference.
    """
    return loss_sums(model, batch, (batch.input_ids.shape[0],), head, plain)[0]


def loss_sums(
    model: nn.Module, batch: Batch, counts: Sequence[int], head: nn.Linear | None = None, plain: bool = False
) -> list[Tensor]:
    """The same for several owners of rows, each a sum of its own: the first `counts[0]` rows are those of the first owner, and so on."""
    if head is None:
        logits, targets = _logits(model, batch)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        pairs = zip(logits.split(list(counts)), targets.split(list(counts)), strict=True)
        return [F.cross_entropy(x.flatten(0, -2), t.flatten(), ignore_index=-100, reduction="sum") for x, t in pairs]
    with _passing(head):
        hidden, targets = _logits(model, batch)
    work = linear_cross_entropy_sliced if plain else linear_cross_entropy
    pairs = zip(hidden.split(list(counts)), targets.split(list(counts)), strict=True)
    return [work(h.flatten(0, -2), head.weight, t.flatten(), head.bias) for h, t in pairs]


def fusible(model: nn.Module) -> nn.Linear | None:
    """The output head, if the model's logits are exactly what it returns: no adapter on it, not trained, no softcap or scale behind it.

    Found by trying: with a head that hands its input on, the model must return that very tensor.
    """
    find = getattr(_inner(model), "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Linear) or getattr(head, "plan", None) is not None or not head.weight.is_floating_point():
        return None
    if head.weight.requires_grad or head.weight.is_meta or head._forward_hooks or head._forward_pre_hooks:
        return None
    ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), _passing(head) as seen:
            out = _tensor(model(ids, use_cache=False) if "use_cache" in accepts(model) else model(ids))
    finally:
        for module in training:
            module.training = True
    return head if len(seen) == 1 and out is seen[0] else None


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


def _logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (n, C, V) and targets (n, C) at the positions that matter (all of them where the model gives no choice)."""
    takes = accepts(model)
    kwargs: dict[str, Any] = {}
    if batch.cu_seqlens is not None:
        _ready_for_packing(model)
        kwargs = attention.packed_kwargs(batch.cu_seqlens, batch.lengths)
        kwargs["position_ids"] = batch.position_ids
    elif batch.attention_mask is not None and "attention_mask" in takes:
        kwargs["attention_mask"] = batch.attention_mask
    if "use_cache" in takes:
        kwargs["use_cache"] = False  # a cache costs memory, and its presence turns transformers' own detection of packing off
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
