"""What kinds of layer there are, and how their weights lie."""

from __future__ import annotations

from typing import Any

from torch import nn


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
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if is_conv(layer):
        return int(layer.in_channels), int(layer.out_channels)
    return int(layer.in_features), int(layer.out_features)
