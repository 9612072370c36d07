"""Our own Triton kernels are compiled while the self-check's plain pass keeps the card busy, and not when the fast pass comes to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from weft.kernels.linear_cross_entropy import linear_cross_entropy
from weft.step.gated import MAPS, Way, dtype_of

logger = logging.getLogger("weft")


def launch(mlps: Mapping[nn.Module, Way], head: nn.Linear | None, ids: Tensor) -> Thread:
    """Begin to run one gated MLP of each kind, forward and back, and the loss, on a few tokens, in a thread; no gradient is kept.

    ids: the tokens of a micro-batch. Triton tells numbers apart by whether 16 divides them, so these tokens are as many in that respect.
    """
    few = 16 if ids.numel() % 16 == 0 else 17
    kinds = {_kind(mlp, way): (mlp, way) for mlp, way in mlps.items()}

    def begin() -> None:
        try:
            # The thread that runs backward passes on this card has the plain one to do.
            here = torch.cuda.device_of(ids)  # type: ignore[no-untyped-call]
            with here, torch.autograd.set_multithreading_enabled(False):
                for mlp, way in kinds.values():
                    _mlp(mlp, way, few, ids.device)
                if head is not None:
                    with torch.no_grad():
                        h = torch.zeros(few, head.in_features, dtype=head.weight.dtype, device=ids.device)
                        linear_cross_entropy(h, head.weight, ids.new_zeros(few), head.bias)
        except Exception:  # such as a card that is full; whoever launches next compiles, and meets what is wrong
            logger.debug("kernels were not compiled ahead", exc_info=True)

    thread = Thread(target=begin, name="weft-compiles-kernels", daemon=True)
    thread.start()
    return thread


def _mlp(mlp: Any, way: Way, few: int, device: torch.device) -> None:
    x = torch.zeros(1, few, mlp.gate_proj.in_features, dtype=dtype_of(mlp), device=device, requires_grad=True)
    y = way(mlp, x)
    torch.autograd.grad(y, [x, *(p for p in mlp.parameters() if p.requires_grad)], torch.zeros_like(y), allow_unused=True)


def _kind(mlp: nn.Module, way: Way) -> tuple[Any, ...]:
    """What a kernel's compilation can depend on, and more."""
    parts: list[Any] = [way, dtype_of(mlp)]
    for name in MAPS:
        plan: Any = mlp._modules[name].plan  # type: ignore[union-attr]
        parts += [type(plan), *plan.A.shape, *plan.B.shape, plan.A.dtype]
    return tuple(parts)
