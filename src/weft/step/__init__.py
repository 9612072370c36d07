"""One training step's arithmetic: forward and loss, on the plain path and on the fast one."""

from __future__ import annotations

from weft.step.capture import peak_memory, reset_peak_memory
from weft.step.fast import Fast, prepare
from weft.step.loss import fusible, loss_sum, loss_sums
from weft.step.warming import warm

__all__ = ["Fast", "fusible", "loss_sum", "loss_sums", "peak_memory", "prepare", "reset_peak_memory", "warm"]
