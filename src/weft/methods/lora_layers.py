"""LoRA on embeddings and convolutions (shapes are those of peft's files), and the stacks for rows with an adapter each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Mixture, Site, WeftError, plain
from weft.quant import dense

if TYPE_CHECKING:
    from weft.methods.lora import LoRA


def _refuse_biases(method: LoRA, what: str) -> None:
    if method.lora_bias:
        raise WeftError(f"lora_bias: {what} has no place for it; leave it out or target linear layers only")


class LowRankEmbedding(Adapter):
    """e(i) = W[i] + s · (B A)ᵀ[i], with A (rank, vocabulary) starting at zero and B (width, rank)."""

    def __init__(self, method: LoRA, layer: Site, rank: int, scale: float) -> None:
        super().__init__()
        _refuse_biases(method, "an embedding")
        module: Any = layer
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(rank, module.num_embeddings))
        self.B = nn.Parameter(nn.init.normal_(torch.empty(module.embedding_dim, rank)))

    def forward(self, layer: Site | Around, ids: Tensor) -> Tensor:
        y = layer.frozen(ids)
        wide = getattr(plain(layer), "embed_scale", 1.0)  # Gemma multiplies its embeddings by √width inside the module
        return y + (F.embedding(ids, self.A.T) @ self.B.T * self.scale * wide).to(y.dtype)  # type: ignore[no-any-return]

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        return {"weight": torch.addmm(dense(plain(layer)).float(), self.A.detach().T, self.B.detach().T, alpha=self.scale)}


class LowRankConv(Adapter):
    """y = conv(x, W) + s · conv₁ₓ₁(conv(x, A), B), where A (rank, in, *kernel) has the layer's stride, padding and dilation.

    With groups, A is ungrouped and B (out, rank / groups, 1, ...) carries them, as in peft.
    """

    def __init__(self, method: LoRA, layer: Site, rank: int, scale: float) -> None:
        super().__init__()
        _refuse_biases(method, "a convolution")
        conv: Any = layer
        if rank % conv.groups:
            raise WeftError(f"a rank of {rank} on a convolution with {conv.groups} groups: the rank must be a multiple of the groups")
        self.scale, self.dropout = scale, method.dropout
        self.A = method.first(torch.empty(rank, conv.in_channels, *conv.kernel_size))
        self.B = nn.Parameter(torch.zeros(conv.out_channels, rank // conv.groups, *(1 for _ in conv.kernel_size)))
        own = conv.bias if method.bias != "none" else None
        self.bias = None if own is None else nn.Parameter(own.detach().to("cpu" if not own.is_meta else "meta", torch.float32, copy=True))

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        conv = plain(layer)
        y = layer.frozen(x)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        S = convolve(x.to(y.dtype), self.A.to(y.dtype), stride=conv.stride, padding=padding, dilation=conv.dilation)
        y = y + self.scale * convolve(S, self.B.to(y.dtype), groups=conv.groups)
        if self.bias is not None:
            y = y + (self.bias - conv.bias).to(y.dtype).view(-1, *(1 for _ in conv.kernel_size))
        return y  # type: ignore[no-any-return]

    def unmergeable(self, layer: Site) -> str | None:
        groups = plain(layer).groups
        return f"a convolution with {groups} groups cannot hold the update, since A mixes its channels" if groups > 1 else None

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        conv = plain(layer)
        W, A, B = dense(conv).float(), self.A.detach(), self.B.detach()
        new = {"weight": W + self.scale * (B.flatten(1) @ A.flatten(1)).view(W.shape)}
        return new if self.bias is None else new | {"bias": self.bias.detach()}


def stacked(mixture: Mixture, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, in, rank) and (rows, rank, out) with the scale in it; zeros for rows without adapter. Kept while no weight changes."""
    many: Any = mixture.adapters
    versions = None if torch.is_grad_enabled() else mixture.versions()
    key = (len(rows), dtype, versions)
    if versions is not None and mixture.cache.get("key") == key:
        return mixture.cache["stacks"]  # type: ignore[no-any-return]
    rank = max(a.A.shape[0] for a in many)
    A = torch.stack([F.pad(a.A.to(dtype), (0, 0, 0, rank - a.A.shape[0])) for a in many])
    B = torch.stack([F.pad(a.B.to(dtype) * a.scale, (0, rank - a.B.shape[1])) for a in many])
    owner = rows.clamp_min(0)
    stacks = A[owner].mT, (B[owner] * (rows >= 0).to(dtype)[:, None, None]).mT
    if versions is not None:
        mixture.cache.update(key=key, stacks=stacks)
    return stacks
