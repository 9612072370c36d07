"""What kinds of layer there are, and how their weights lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(layer: object) -> bool:
    """transformers' Conv1D: a linear layer that stores its weight as (in, out). Known by its shape, so that it need not be imported."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(layer).__mro__)


def is_linear(layer: object) -> bool:
    """A map x (..., in) ↦ y (..., out) that is affine: nn.Linear (quantised ones derive from it) or transformers' Conv1D."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def is_conv(layer: object) -> bool:
    """nn.Conv1d, Conv2d or Conv3d (not the transposed ones)."""
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, an embedding (vocabulary, width) or a convolution (channels)."""
    if is_conv1d(layer):
        shape, _ = logical(layer)
        return shape[0], shape[1]
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if is_conv(layer):
        return int(layer.in_channels), int(layer.out_channels)
    return int(layer.in_features), int(layer.out_features)


def is_sharded(tensor: object) -> bool:
    """Whether this process holds a part of the tensor only: a DTensor, which FSDP2 makes of parameters."""
    return hasattr(tensor, "full_tensor")


def logical(layer: Any, name: str = "weight") -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of a parameter as numbers. A layer that packs its parameters has a method of this name, and `unpacked` beside it."""
    ask = getattr(layer, "logical", None)
    if ask is not None:
        return ask(name)  # type: ignore[no-any-return]
    held = layer._parameters[name]
    return held.shape, held.dtype


def numbers(layer: Any, name: str = "weight") -> Tensor:
    """A parameter as numbers, in the layer's own layout, whether it is packed or not."""
    ask = getattr(layer, "unpacked", None)
    held: Tensor = layer._parameters[name].detach() if ask is None else ask(name)
    return held
