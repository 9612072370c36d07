"""LoRA on embeddings and convolutions. Shapes are those of peft's files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Around, Site, WeftError, plain
from weft.methods.lora_linear import Factors
from weft.quant import dense

if TYPE_CHECKING:
    from weft.methods.lora import LoRA


def _refuse_biases(method: LoRA, what: str) -> None:
    if method.lora_bias:
        raise WeftError(f"lora_bias: {what} has no place for it; leave it out or target linear layers only")


class LowRankEmbedding(Factors):
    """e(i) = W[i] + s · (B A)ᵀ[i], with A (rank, vocabulary) starting at zero and B (width, rank)."""

    def start(self, method: LoRA, layer: Any, rank: int) -> None:
        _refuse_biases(method, "an embedding")
        if not method.train_A:
            raise WeftError("train_A=False: an embedding's A starts at zero, and would stay there; target other layers only")
        self.dropout = 0.0  # ids cannot be dropped
        self.A = nn.Parameter(torch.zeros(rank, layer.num_embeddings))
        self.B = nn.Parameter(nn.init.normal_(torch.empty(layer.embedding_dim, rank)))

    def update(self, layer: Any, y: Tensor, x: Tensor, B: Tensor) -> Tensor:
        wide = getattr(layer, "embed_scale", 1.0)  # Gemma multiplies its embeddings by √width inside the module
        return y + (F.embedding(x, self.A.T) @ B.T * self.scale * wide).to(y.dtype)

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        return {"weight": torch.addmm(dense(plain(layer)).float(), self.A.detach().T, self.B.detach().T, alpha=self.scale)}


class LowRankConv(Factors):
    """y = conv(x, W) + s · conv₁ₓ₁(conv(x, A), B), where A (rank, in, *kernel) has the layer's stride, padding and dilation.

    With groups, A is ungrouped and B (out, rank / groups, 1, ...) carries them, as in peft.
    """

    def start(self, method: LoRA, layer: Any, rank: int) -> None:
        _refuse_biases(method, "a convolution")
        conv = layer
        if rank % conv.groups:
            raise WeftError(f"a rank of {rank} on a convolution with {conv.groups} groups: the rank must be a multiple of the groups")
        self.A = method.first(torch.empty(rank, conv.in_channels, *conv.kernel_size))
        self.B = nn.Parameter(torch.zeros(conv.out_channels, rank // conv.groups, *(1 for _ in conv.kernel_size)))

    def update(self, layer: Any, y: Tensor, x: Tensor, B: Tensor) -> Tensor:
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        S = convolve(x.to(y.dtype), self.A.to(y.dtype), stride=layer.stride, padding=padding, dilation=layer.dilation)
        return y + self.scale * convolve(S, B.to(y.dtype), groups=layer.groups)  # type: ignore[no-any-return]

    def unmergeable(self, layer: Site) -> str | None:
        groups = plain(layer).groups
        return f"a convolution with {groups} groups cannot hold the update, since A mixes its channels" if groups > 1 else None

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        W, A, B = dense(plain(layer)).float(), self.A.detach(), self.B.detach()
        return {"weight": W + self.scale * (B.flatten(1) @ A.flatten(1)).view(W.shape)} | self.merged_bias(layer)
