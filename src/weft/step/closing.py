"""The norm behind the last layer as one kernel each way (RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

It lies in no compiled layer. As transformers writes it out it passes over the hidden states in fp32 some fifteen times a step, and has
five tensors of them at once where the step's memory is at its peak.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import FAILS, is_sharded
from weft.step.gated import touched
from weft.step.placed import forward_of, take

logger = logging.getLogger("weft")
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}  # by how much two roundings may lie apart, of a number


def closing(model: nn.Module, layers: list[nn.Module]) -> nn.Module | None:
    """The norm beside the list of layers, where trying shows that it is this one."""
    for m in model.modules():
        if any(layers[-1] is part for child in m.children() if isinstance(child, nn.ModuleList) for part in child):
            return next((one for one in m.children() if _able(one)), None)
    return None


def _able(m: Any) -> bool:
    weight = getattr(m, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.dtype not in NEAR or weight.requires_grad or touched(m):
        return False
    if is_sharded(weight):  # whole only within the model's own forward
        return False
    if next(m.children(), None) is not None or len(list(m.parameters())) != 1 or not isinstance(_eps(m), float):
        return False
    x = torch.linspace(-3, 5, 4 * len(weight), device=weight.device).view(4, -1).to(weight.dtype)
    with torch.no_grad():
        try:
            own = m(x)
        except FAILS as error:  # one that wants more than hidden states
            logger.info("the norm behind the layers is left as it is: %s fails when tried (%s)", type(m).__name__, error)
            return False
        return isinstance(own, Tensor) and own.dtype == x.dtype and torch.allclose(own, _norm(m, x), NEAR[x.dtype], NEAR[x.dtype])


def _eps(m: Any) -> Any:
    return getattr(m, "variance_epsilon", getattr(m, "eps", None))


def _norm(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, m.weight.shape, m.weight, _eps(m))


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In training; evaluation goes by its own."""
    if not torch.is_grad_enabled() or kwargs or len(args) != 1 or args[0].dtype != self.weight.dtype or self.weight.requires_grad:
        return type(self).forward(self, *args, **kwargs)
    return _norm(self, args[0])


def install(norm: nn.Module | None) -> None:
    if norm is not None:
        forward_of(norm, _forward)


def uninstall(norm: nn.Module | None) -> None:
    if norm is not None:
        take(norm, "forward")
