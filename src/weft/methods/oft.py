"""OFT: orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280), on inputs as in OFTv2 (Qiu et al. 2025, arXiv:2506.19847).

    h = W₀ (R x) + b,   R block-diagonal of (I - Q)(I + Q)⁻¹,   Qᵀ = -Q        Q starts at zero: R = I, the base

By default the inverse is a Neumann series, R ≈ I + 2Q + 2Q² + ... + Qⁿ⁻¹, near to orthogonal while Q is small and free of a solve. The
numbers of Q are its upper triangle, row by row; its blocks act on rows x as x R. Merged: W = W₀ Rᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.core import Adapter, Around, Method, Site, WeftError, is_conv, is_conv1d, is_linear, plain
from weft.methods.updates import Update, shape_of
from weft.quant import dense


class Rotation(Update):
    """Turns the inputs of a linear layer, or the flattened kernels (in / groups · kernel) of a convolution."""

    def __init__(self, method: OFT, layer: Site) -> None:
        super().__init__()
        self.how = method
        inside = prod(shape_of(layer)[1:])
        size = divisor(inside, method.block_size) if method.block_size else inside // divisor(inside, method.blocks)
        self.size, self.blocks = size, inside // size
        self.R = nn.Parameter(torch.zeros(1 if method.block_share else self.blocks, size * (size - 1) // 2))

    def rotations(self) -> Tensor:
        """R's blocks, (blocks or 1, size, size)."""
        how, n = self.how, self.size
        R = self.R.float()
        Q = R.new_zeros(len(R), n, n)
        rows, columns = torch.triu_indices(n, n, 1, device=Q.device)
        Q = Q.index_put((torch.arange(len(Q), device=Q.device)[:, None], rows, columns), R)
        Q = Q - Q.mT
        if how.coft:  # kept in a ball around the identity; the gradient passes as if nothing had been done
            near = how.eps / sqrt(len(Q)) / Q.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
            Q = Q + (Q * near.clamp_max(1) - Q).detach()
        one = torch.eye(n, device=Q.device)
        if not how.use_cayley_neumann:
            solved: Tensor = torch.linalg.solve(one + Q, one - Q, left=False)
            return self._dropped(solved)
        R, power, terms = one.expand_as(Q), one, how.num_cayley_neumann_terms
        for i in range(1, max(terms, 4) if terms > 2 else terms):  # peft's series has its cubic from three terms on
            power = power @ Q
            R = R + (power if i == max(terms, 4) - 1 else 2 * power)
        return self._dropped(R)

    def _dropped(self, R: Tensor) -> Tensor:
        if not self.training or not self.how.module_dropout or len(R) == 1:
            return R
        lost = torch.randperm(len(R), device=R.device) < int(self.how.module_dropout * len(R))
        return torch.where(lost[:, None, None], torch.eye(self.size, device=R.device), R)

    def turn(self, x: Tensor) -> Tensor:
        """x R for rows x (..., in), in fp32 and then x's dtype."""
        return self._blockwise(x, self.rotations()).to(x.dtype)

    def _blockwise(self, x: Tensor, R: Tensor) -> Tensor:
        """Each block of a row times its own matrix, in one batched product over the blocks."""
        rows = x.reshape(-1, self.blocks, self.size).transpose(0, 1).to(R.dtype)
        return torch.bmm(rows, R.expand(self.blocks, -1, -1)).transpose(0, 1).reshape(x.shape)

    def forward(self, layer: Site | Around, x: Tensor) -> Tensor:
        return super().forward(layer, x) if is_conv(plain(layer)) else layer.frozen(self.turn(x))

    def delta(self, layer: Any) -> Tensor:
        """W₀ Rᵀ - W₀; x ↦ x R and W ↦ W Rᵀ are one function."""
        W = dense(layer).float()
        W = W.T if is_conv1d(layer) else W
        return self._blockwise(W, self.rotations().mT) - W


def divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to `wanted`, the smaller of two as near; n itself if `wanted` is not below it. As peft chooses."""
    if wanted >= n:
        return n
    return min((m for m in range(1, n + 1) if n % m == 0), key=lambda m: (abs(m - wanted), m))


@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Orthogonal fine-tuning: rotates what goes into a layer, so lengths and angles between its inputs stay.

    Args:
        block_size: Rows of each rotation; the nearest divisor of a layer's inputs is taken. 0 to give `blocks` instead.
        blocks: How many rotations a layer has, in place of block_size.
        block_share: One rotation serves all blocks of a layer.
        module_dropout: The share of blocks that stay the identity in a training step.
        coft: Constrained OFT: each Q is kept within eps / √blocks of zero.
        eps: That bound.
        use_cayley_neumann: A Neumann series in place of the inverse.
        num_cayley_neumann_terms: Its terms.
    """

    block_size: int = 32
    blocks: int = 0
    block_share: bool = False
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    default_lr: ClassVar[float] = 2e-4
    site: ClassVar[str] = "linear layers, transformers' Conv1D and convolutions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.block_size > 0) == (self.blocks > 0):
            raise WeftError(f"OFT wants either a block_size or a number of blocks, not {self.block_size} and {self.blocks}: set one to 0")
        if not 0 <= self.module_dropout < 1:
            raise WeftError(f"OFT cannot be built with a module_dropout of {self.module_dropout}: it is at least 0 and below 1")

    def accepts(self, layer: nn.Module) -> bool:
        return is_linear(layer) or is_conv(layer)

    def build(self, layer: Site, path: str) -> Adapter:
        return Rotation(self, layer)
