"""What methods share that add a matrix to a weight: y = layer(x) + ΔW x, for linear layers and convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.core import Adapter, Around, Site, features, is_conv, is_conv1d, plain
from weft.quant import dense


class Update(Adapter):
    """y = layer(x) + ΔW x, where `delta` gives ΔW as (out, in) or, for a convolution, (out, in / groups, *kernel).

    Two kinds of dropout act while training, both LyCORIS's: `rank_dropout` drops rows of ΔW, `module_dropout` all of it.
    """

    rank_dropout = 0.0
    module_dropout = 0.0
    rescale = True  # what rank_dropout leaves is scaled up to keep the mean

    def delta(self, layer: Any) -> Tensor:
        """ΔW, in fp32."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its update is")

    def rounded(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """ΔW in the dtype in which it acts."""
        return self.delta(layer).to(dtype)

    def act(self, layer: Any, x: Tensor) -> Tensor:
        """ΔW x, in x's dtype."""
        W = self.rounded(layer, x.dtype)
        return layer._conv_forward(x, W, None) if is_conv(layer) else F.linear(x, W)

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        y: Tensor = layer.frozen(x)
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            return y
        more = self.act(plain(layer), x.to(y.dtype))
        if self.training and self.rank_dropout:
            module = plain(layer)
            keep = (torch.rand(features(module)[1], device=y.device) > self.rank_dropout).to(y.dtype)
            more = more * (keep / keep.mean().clamp_min(1e-6) if self.rescale else keep).view(-1, *_ones(module))
        return y + more

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module, delta = plain(layer), self.delta(plain(layer)).detach()
        return {"weight": dense(module).float() + (delta.T if is_conv1d(module) else delta)}


def shape_of(layer: Any) -> tuple[int, ...]:
    """(out, in) of a linear layer, (out, in / groups, *kernel) of a convolution; also where the weight is packed."""
    inside, outside = features(layer)
    return (outside, inside // layer.groups, *layer.kernel_size) if is_conv(layer) else (outside, inside)


def core_shape(layer: Any, rank: int) -> tuple[int, ...]:
    """The shape of a Tucker core: (rank, rank, *kernel), and peft's (rank, rank, kernel, 1) for one dimension."""
    return (rank, rank, *layer.kernel_size, *((1,) if len(layer.kernel_size) == 1 else ()))


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ core[i, j, ...] a[i, p] b[j, r], as (p, r, ...)."""
    return torch.einsum("ij...,ip,jr->pr...", core, a, b)


def effective(layer: Any, asked: bool) -> bool:
    """Whether a convolution gets a core of its own: where that was asked for and the kernel is more than one point."""
    return asked and is_conv(layer) and any(k > 1 for k in layer.kernel_size)


def _ones(layer: Any) -> tuple[int, ...]:
    return (1,) * len(layer.kernel_size) if is_conv(layer) else ()
