"""Which layer is what in a transformer, by the names that transformers gives them; and vectors over a layer's channels.

A rule instead of a table of architectures: the names below stand for the same thing in every family that uses them, so a model that nobody
listed is found too. `targets` overrides it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import Mixture, is_conv, is_linear

_KEY = {"k", "k_proj", "key", "key_proj", "k_lin"}
_VALUE = {"v", "v_proj", "value", "value_proj", "v_lin"}
_FUSED = {"query_key_value", "c_attn", "qkv_proj", "qkv", "Wqkv", "in_proj"}  # queries too, since they are one layer
_MIXED = {"o", "o_proj", "out_proj", "out_lin", "dense", "c_proj", "proj", "Wo"}
_SHRINKS = {"down_proj", "w2", "wo", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "lin2", "linear2", "ffn_output"}


def role(path: str, layer: nn.Module) -> str:
    """What a linear layer does in its block: "key", "value", "fused" (query, key and value), "attention" (the projection that leaves
    attention), "feedforward" (the one that leaves the feed-forward block), or "" for anything else."""
    *parents, name = path.split(".")
    if not is_linear(layer):
        return "feedforward" if _is_mixture(layer) else ""
    if any(re.search("att", p, re.I) for p in parents):
        kinds = {"key": _KEY, "value": _VALUE, "fused": _FUSED, "attention": _MIXED}
        return next((kind for kind, names in kinds.items() if name in names), "")
    inside = any(p.isdigit() for p in parents)  # one of a stack of blocks, so no pooler or head
    return "feedforward" if inside and (name in _SHRINKS or [*parents[-1:], name] == ["output", "dense"]) else ""


def _is_mixture(layer: nn.Module) -> bool:
    """A mixture of experts whose experts are fused into one module: the block as a whole is the feed-forward."""
    children = layer._modules
    return "experts" in children and ("gate" in children or "router" in children)


def spread(layer: Any, v: Tensor, x: Tensor) -> Tensor:
    """One value a channel, v (channels,) or (rows, channels), in a shape that broadcasts over x."""
    after = len(layer.kernel_size) if is_conv(layer) else x.dim() - 2 if channels_second(layer) else 0
    one = (1,) * after
    if v.dim() == 1:
        return v.view(-1, *one)
    return v.view(len(v), *(1,) * (x.dim() - 2 - after), -1, *one)


def channels_second(layer: object) -> bool:
    """Whether a layer's output has its channels right after the batch."""
    return is_conv(layer) or isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm)


def table(mixture: Mixture, rows: Tensor, vectors: list[Tensor], neutral: Tensor) -> Tensor:
    """(rows, channels): the vector of each row's own adapter, and `neutral` for rows without one, which -1 finds at the end."""
    return torch.stack([*vectors, neutral])[rows]
