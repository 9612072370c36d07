"""The self-check: one micro-batch through the fast path and through the plain one must give the same loss and the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from weft.core import Adapter, WeftError
from weft.step.routing import routed

P, T = ParamSpec("P"), TypeVar("T")

# ‖fast - plain‖ / ‖plain‖: of the loss, of all gradients together, and of one parameter's gradient. In fp32 only the order of sums
# differs. In 16 bit every layer rounds, and the two paths round elsewhere: gradients lie 0.05 apart for 16 layers of random weights, 0.12
# for 32, and losses 0.022 on the embedded base in bf16: rows that begin alike err alike, which no mean takes away. fp8 rounds both sides of
# every product to 3 bits of mantissa: 0.05 apart on trained weights, but 0.7 for 32 random layers, so that bound finds only what is grossly
# wrong; what decides is each product's own distance (weft.step.fp8).
BOUNDS = {"fp32": (1e-4, 1e-3, 1e-2), "16 bit": (4e-2, 0.25, 0.5), "fp8": (4e-2, 0.9, 1.5)}


def bounds(model: nn.Module, fp8: bool) -> tuple[str, tuple[float, float, float]]:
    """(kind, its bounds) for the arithmetic of this model's base; fp8: whether products are in it."""
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers())}
    if fp8:
        return "fp8", BOUNDS["fp8"]
    kind = "16 bit" if kinds & {torch.bfloat16, torch.float16} else "fp32"
    return kind, BOUNDS[kind]


def pieces(batch: Any, tokens: int) -> list[Any]:
    """A batch's rows in batches of about so many tokens, whose losses add up to that of the whole."""
    if batch.cu_seqlens is None:
        step = max(1, tokens // batch.input_ids.shape[1])
        rows = [slice(i, i + step) for i in range(0, batch.input_ids.shape[0], step)]
        names = ("input_ids", "position_ids", "targets", "attention_mask", "owners")
        return [replace(batch, **{n: None if (t := getattr(batch, n)) is None else t[r] for n in names}) for r in rows]
    starts, cuts = [0, *accumulate(batch.lengths)], [0]
    for i in range(1, len(starts)):
        if starts[i] - starts[cuts[-1]] >= tokens or i == len(starts) - 1:
            cuts.append(i)
    made = []
    for first, last in pairwise(cuts):
        span = slice(starts[first], starts[last])
        if span.start == span.stop:  # empty rows, at the end of a batch that was filled up
            continue
        ids, places, targets = (getattr(batch, n)[:, span] for n in ("input_ids", "position_ids", "targets"))
        ends = batch.cu_seqlens[first : last + 1] - batch.cu_seqlens[first]
        made.append(replace(batch, input_ids=ids, position_ids=places, targets=targets, cu_seqlens=ends, keep=None,
                            lengths=batch.lengths[first:last], owners=batch.owners[first:last]))  # fmt: skip
    return made


def measure(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor], parameters: Mapping[str, nn.Parameter]
) -> tuple[float, dict[str, Tensor]]:
    """The sum of some batches' losses, one pass after another, and every parameter's gradient of it; gradients are zero afterwards.

    What was there before is dropped.
    """
    total = 0.0
    for p in parameters.values():
        if p.grad is not None:
            p.grad.zero_()
    for batch in batches:
        with routed(model, batch):
            part = loss(batch)
            part.backward()  # type: ignore[no-untyped-call]
        total += float(part.detach())
    grads = {}
    for name, p in parameters.items():
        if p.grad is not None:
            grads[name] = p.grad.detach().clone()
            p.grad.zero_()
    return total, grads


def differences(
    fast: tuple[float, dict[str, Tensor]], plain: tuple[float, dict[str, Tensor]], limits: tuple[float, float, float]
) -> tuple[str, list[str]]:
    """(what was found, in words; what is beyond its limit, one line each).

    A gradient that is small beside the largest one is measured against a hundredth of that.
    """
    losses = abs(fast[0] - plain[0]) / max(abs(plain[0]), 1e-6)
    wrong = [] if losses <= limits[0] else [f"the loss is {fast[0]:.6g} and should be {plain[0]:.6g}"]
    sizes = {name: float(g.float().norm()) for name, g in plain[1].items()}
    floor = max(sizes.values(), default=0.0) / 100
    apart = {n: float((fast[1][n].float() - g.float()).norm()) if n in fast[1] else math.inf for n, g in plain[1].items()}
    shares = {n: apart[n] / max(sizes[n], floor, 1e-20) for n in sizes}
    total = math.hypot(*apart.values()) / max(math.hypot(*sizes.values()), 1e-20)
    if not total <= limits[1]:
        wrong.append(f"all gradients together are off by {total:.2g} of their size")
    wrong += [f"{n}: its gradient is off by {share:.2g} of its size" for n, share in shares.items() if not share <= limits[2]]
    worst = max(shares.values(), default=0.0)
    found = (f"loss within {losses:.1e} (bound {limits[0]:g}), gradients within {total:.1e} ({limits[1]:g}), "
             f"the worst one within {worst:.1e} ({limits[2]:g})")  # fmt: skip
    return found, wrong


@contextmanager
def as_stored(model: nn.Module, batch: Any) -> Iterator[None]:
    """Within it the base computes in the dtype that it is stored in: the fast step's operations are made for that, and so is their check.

    In 16 bit that is what `torch.autocast` is for, so it is off meanwhile. WeftError where autocast is on and the base in fp32.
    """
    device = batch.input_ids.device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    if bounds(model, False)[0] == "fp32":
        raise WeftError(
            "torch.autocast is on and the base is in fp32, in which the fast step would compute: load the base in bf16 instead"
        )
    with torch.autocast(device, enabled=False):
        yield


def stored(function: Callable[Concatenate[nn.Module, Any, P], T]) -> Callable[Concatenate[nn.Module, Any, P], T]:
    """A function of a model and a batch, `as_stored`."""

    @wraps(function)
    def within(model: nn.Module, batch: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with as_stored(model, batch):
            return function(model, batch, *args, **kwargs)

    return within


@contextmanager
def stirred(parameters: Mapping[str, nn.Parameter], device: torch.device) -> Iterator[None]:
    """Adapters start as the identity by a factor of zero, which hides the other factor's gradient: fill it for the time of the check."""
    zero = [p for p in parameters.values() if not p.detach().any()]
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in zero:
                p.copy_(0.01 * torch.randn(p.shape, device=p.device))
        try:
            yield
        finally:
            with torch.no_grad():
                for p in zero:
                    p.zero_()


def active_dropout(model: nn.Module) -> bool:
    """Whether two passes of the model in training mode would differ."""
    for module in model.modules():
        rates = [getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout")]
        if isinstance(module, Adapter):
            rates += [rate for name, rate in vars(getattr(module, "method", module)).items() if "dropout" in name]
        if any(isinstance(r, float) and r > 0 for r in rates):
            return True
    return False


def recomputes(model: nn.Module) -> bool:
    """Whether the model computes its layers again in the backward pass by itself (gradient checkpointing)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
