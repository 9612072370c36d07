"""LoRA that starts from the base's own weight: PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775).

    h = W₀x + s (BA − B₀A₀) x          where A, B start as A₀, B₀, a part of W₀

Both papers take s·B₀A₀ out of W₀ and train it. Here W₀ keeps its bytes and the adapter holds the start, which is the same function. What
is computed, and what a file holds, is B(A − A₀) + (B − B₀)A₀: a plain LoRA of rank 2r at the same scale, and exactly zero at the start,
in any precision.
"""

from __future__ import annotations

import re
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.core import WeftError, features, is_conv1d
from weft.kernels.low_rank import low_rank_add
from weft.methods.lora_linear import LowRank
from weft.quant import dense

if TYPE_CHECKING:
    from weft.methods.lora import LoRA

FROM_BASE = re.compile(r"pissa(_niter_[1-9]\d*)?|olora")


class LowRankFrom(LowRank):
    """The update of a linear layer, counted from where its factors started."""

    A0: Tensor
    B0: Tensor

    def start(self, method: LoRA, layer: Any, rank: int) -> None:
        inside, outside = features(layer)
        if rank > min(inside, outside):
            raise WeftError(f'init="{method.init}" with a rank of {rank}: a layer with {inside} inputs and {outside} outputs has no more '
                            f"than {min(inside, outside)} directions to start from")  # fmt: skip
        A, B = torch.empty(rank, inside), torch.empty(outside, rank)
        if not (A.is_meta or layer.weight.is_meta):
            with torch.no_grad():
                W = dense(layer).float()
                A, B = (t.contiguous().cpu() for t in beginning(W.T if is_conv1d(layer) else W, rank, self.scale, method.init))
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", A.clone(), persistent=False)
        self.register_buffer("B0", B.clone(), persistent=False)
        self.b = nn.Parameter(torch.zeros(outside)) if method.lora_bias else None

    def product(self) -> tuple[Tensor, Tensor]:
        return torch.cat((self.A - self.A0, self.A0)), torch.cat((self.B, self.B - self.B0), 1)

    def update(self, layer: Any, y: Tensor, x: Tensor, B: Tensor) -> Tensor:
        return low_rank_add(y, x, *self.product(), self.scale)


def beginning(W: Tensor, rank: int, scale: float, how: str) -> tuple[Tensor, Tensor]:
    """A₀ (rank, in) and B₀ (out, rank) for a weight W (out, in).

    PiSSA: s B₀A₀ is W's best approximation of that rank, UᵣSᵣVᵣᵀ, with √(Sᵣ/s) in each factor (equations 2 and 3); "pissa_niter_N" finds
    it by N rounds of subspace iteration (Halko et al. 2011), on the CPU, so that a seed means the same everywhere. OLoRA: W = QR;
    B₀ and A₀ are the first columns of Q and the first rows of R.
    """
    if how == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:rank], Q[:, :rank]
    rounds = how.removeprefix("pissa").removeprefix("_niter_")
    if rounds:
        U, S, V = torch.svd_lowrank(W.cpu(), q=rank, niter=int(rounds))
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt() / sqrt(scale)
    return root[:, None] * Vh[:rank], U[:, :rank] * root
