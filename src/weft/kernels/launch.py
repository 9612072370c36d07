"""Whether the Triton kernels can be used, and the module that holds them, which is imported with the first tensor for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Launch = TypeVar("Launch", bound=Callable[..., Any])

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = find_spec("triton") is not None  # a CPU build of torch has none, and then the plain twin does the work


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor."""
    return (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")) and INSTALLED


def on_its_card(launch: Launch) -> Launch:
    """A function that launches on the card of its first tensor: Triton launches on the current one, in no order with the other's work."""

    @wraps(launch)
    def launched(first: Tensor, *rest: Any, **more: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launch(first, *rest, **more)
        with torch.cuda.device(first.device):
            return launch(first, *rest, **more)

    return cast(Launch, launched)


@cache
def kernels(module: str = "triton") -> Any:
    """`weft.kernels.triton`, or another module of Triton kernels beside it."""
    return import_module(f"weft.kernels.{module}")
