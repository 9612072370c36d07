"""One training step's arithmetic: forward and loss."""

from __future__ import annotations

from weft.step.loss import loss_sum

__all__ = ["loss_sum"]
