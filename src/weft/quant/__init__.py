"""Frozen-base formats. One question is asked of all of them: `dense(layer)`, the weight as numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.core import WeftError


def dense(layer: Any) -> Tensor:
    """The weight of a layer as a floating-point tensor, in the layer's own layout. Raises WeftError for a format that weft cannot read."""
    weight = layer.weight
    if not weight.is_floating_point():
        raise WeftError(f"a weight stored as {weight.dtype} ({type(layer).__name__}) is a format that weft cannot read")
    return weight.detach()  # type: ignore[no-any-return]
