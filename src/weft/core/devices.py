"""Devices, as people write them."""

from __future__ import annotations

import torch

from weft.core.errors import WeftError


def device_of(named: str | torch.device, said: str) -> torch.device:
    """The device of this name. said: how the user asked for it.

    Raises:
        WeftError: torch does not know it, or it is not here.
    """
    try:
        device = torch.device(named)
    except RuntimeError:
        raise WeftError(f"{said}: write cpu, cuda or cuda:1") from None
    have = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= have:
        raise WeftError(f"{said}: torch finds {have or 'no'} CUDA device{'' if have == 1 else 's'} here")
    return device
