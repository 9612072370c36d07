"""Ways for both factors of LoRA to start from something, with BA = 0 all the same."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.core import WeftError

# starts that need more than the model: who makes them, and out of what
ELSEWHERE = {
    "eva": "weft.eva(model, method, batches), which looks at data; `weft train` does that with its own",
    "loftq": "weft.loftq_(model, method, 'nf4'), which packs a model that is not packed yet; `weft train` does that with `base: nf4`",
}


def orthogonal(A: Tensor, B: Tensor) -> None:
    """Fill A (rank, in) and B (out, rank): their ranks lie in orthogonal halves of ℝ^rank, so that BA = 0 though neither is zero.

    As in peft: of an orthogonal matrix the one half of the rows spans A, the other B, each with random coefficients of size 1/10.
    Raises WeftError for an odd rank.
    """
    rank = A.shape[0]
    if rank % 2:
        raise WeftError(f'init="orthogonal" needs an even rank, and this layer has {rank}')
    Q = torch.linalg.qr(torch.randn(rank, rank)).Q
    A.copy_((torch.randn(A.shape[1], rank // 2) @ Q[0::2]).T / 10)
    B.copy_(torch.randn(B.shape[0], rank // 2) @ Q[1::2] / 10)
