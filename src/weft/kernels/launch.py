"""Whether the Triton kernels can be used, and the module that holds them, which is imported with the first tensor for it."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = find_spec("triton") is not None  # a CPU build of torch has none, and then the plain twin does the work


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor."""
    return (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")) and INSTALLED


@cache
def kernels(module: str = "triton") -> Any:
    """`weft.kernels.triton`, or another module of Triton kernels beside it."""
    return import_module(f"weft.kernels.{module}")
