"""The arithmetic of low-rank updates: ΔW = B A as two factors, their sums, their best approximations, and arithmetic by element.

Everything has a leading dimension of groups: 1, except for a grouped convolution, whose groups are matrices of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.core import Site, WeftError, base_class, plain
from weft.methods.lora import LowRank
from weft.methods.lora_layers import LowRankConv, LowRankEmbedding
from weft.methods.lora_start import LowRankFrom

Majority = Literal["total", "frequency"]
OVERSAMPLING, SETTLED, ROUNDS = 8, 1e-5, 24  # of `leading`


@dataclass(frozen=True)
class Factors:
    """ΔW = B A with the scale in B. B is (groups, out / groups, rank), A is (groups, rank, in): in counts a convolution's kernel too,
    and for an embedding "in" is the vocabulary."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def dense(self) -> Tensor:
        """(groups, out / groups, in)"""
        return self.B @ self.A


def is_low_rank(adapter: object) -> bool:
    """Whether an adapter adds B A (and perhaps biases) to its layer and does nothing else."""
    known = type(adapter) in (LowRank, LowRankFrom, LowRankConv, LowRankEmbedding)
    return known and not {*_tensors(adapter)} - {"A", "B", "b", "bias", "A0", "B0"}


def _tensors(adapter: Any) -> list[str]:
    return [k for k, v in (*adapter._parameters.items(), *adapter._buffers.items()) if v is not None]


def factors_of(adapter: Any, layer: Site) -> Factors:
    """The factors of a low-rank adapter, in fp32."""
    groups = getattr(plain(layer), "groups", 1) if isinstance(adapter, LowRankConv) else 1
    A, B = (t.detach().float() for t in adapter.product())
    return Factors(B.reshape(groups, -1, B.shape[1]) * adapter.scale, A.reshape(groups, A.shape[0] // groups, -1))


def give(adapter: Any, factors: Factors) -> None:
    """Make these the adapter's own factors, in the shapes that it had (but for the rank), at a scale of 1."""
    adapter.scale = 1.0
    inside, kernel = adapter.A.shape[1:], adapter.B.shape[2:]
    A = factors.A.reshape(-1, *inside)
    B = factors.B.reshape(-1, factors.rank, *kernel)
    adapter.A, adapter.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())


def stack(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ wᵢ Bᵢ Aᵢ = [w₁B₁ w₂B₂ …] [A₁; A₂; …]: exact, whatever the ranks; its rank is their sum."""
    B = torch.cat([p.B * w for p, w in zip(parts, weights, strict=True)], dim=2)
    return Factors(B, torch.cat([p.A for p in parts], dim=1))


def singular(given: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of a product in fp64, as many triplets as its factors allow.

    By QR of both factors and the SVD of the small core between them, so that no matrix of the layer's size is ever formed.
    """
    Qb, Rb = torch.linalg.qr(given.B.double())
    Qa, Ra = torch.linalg.qr(given.A.double().mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT)
    return Qb @ U[:, :, : S.shape[1]], S, Vh[:, : S.shape[1]] @ Qa.mT


def shorten(given: Factors, rank: int | None = None) -> tuple[Factors, float]:
    """The best approximation of that rank (None: the rank that the product really has), and the share of ‖ΔW‖² that it keeps.

    These are the first singular triplets (Eckart and Young 1936 say that they are the best), in fp64, since the rank of a product can be
    seen only beyond fp32's rounding.
    """
    U, S, Vh = singular(given)
    floor = S.amax() * torch.finfo(torch.float32).eps
    true = int(S.gt(floor).sum(-1).max())
    if rank is None and true == given.rank:
        return given, 1.0  # as it was, to the bit
    keep = max(1, true if rank is None else min(rank, true))
    split = S[:, :keep].sqrt()
    B, A = U[:, :, :keep] * split[:, None], split[:, :, None] * Vh[:, :keep]
    return Factors(B.float(), A.float()), _share(S[:, :keep].square().sum(), S.square().sum())


def leading(M: Tensor, rank: int, seed: int = 0) -> tuple[Factors, float]:
    """The best approximation of rank `rank` of dense matrices (groups, out, in), and the share of ‖M‖² that it keeps.

    Subspace iteration from a random start (Halko, Martinsson and Tropp 2011, arXiv:0806.4015, algorithm 4.4) until the kept share moves
    by less than 1e-5 of itself; matrices that are not much larger than the rank take the exact SVD.
    """
    M = M.float()
    small, wide = min(M.shape[1:]), rank + max(OVERSAMPLING, rank // 2)
    if 2 * wide >= small:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        start = torch.randn(M.shape[2], wide, generator=torch.Generator().manual_seed(seed)).to(M.device)
        Q, before = torch.linalg.qr(M @ start)[0], -inf
        for _ in range(ROUNDS):
            P, R = torch.linalg.qr(M.mT @ Q)  # Mᵀ Q = P R, so M ≈ Q Rᵀ Pᵀ
            U, S, Vh = torch.linalg.svd(R.mT)
            now = float(S[:, :rank].square().sum())
            if now - before <= SETTLED * now:
                break
            before = now
            Q = torch.linalg.qr(M @ P)[0]
        U, Vh = Q @ U, Vh @ P.mT
    keep = min(rank, small)
    split = S[:, :keep].sqrt()
    made = Factors(U[:, :, :keep] * split[:, None], split[:, :, None] * Vh[:, :keep])
    return made, _share(S[:, :keep].square().sum(), M.square().sum())


def reaching(M: Tensor, energy: float, seed: int = 0) -> tuple[Factors, float]:
    """The lowest rank that keeps this share of ‖M‖², found by doubling."""
    rank, small, total = 8, min(M.shape[1:]), float(M.float().square().sum())
    while True:
        made, _ = leading(M, min(rank, small), seed)
        each = made.A.square().sum(2).square()  # (groups, rank): A's rows are √σ long
        shares = (each.sum(0).cumsum(0) / total).tolist() if total else [1.0]
        enough = next((i + 1 for i, s in enumerate(shares) if s >= energy * (1 - 1e-6)), None)
        if enough is not None or rank >= small:
            keep = enough or min(rank, small)
            return Factors(made.B[:, :, :keep], made.A[:, :keep]), min(shares[keep - 1], 1.0)
        rank *= 2


def _share(kept: Tensor, whole: Tensor) -> float:
    return min(float(kept / whole), 1.0) if float(whole) else 1.0


# ---- by element -------------------------------------------------------------------------------------------------------------


def trim(x: Tensor, density: float) -> Tensor:
    """The `density` · n largest elements by magnitude; zero elsewhere."""
    n, keep = x.numel(), int(density * x.numel())
    if keep >= n:
        return x
    if keep < 1:
        return torch.zeros_like(x)
    least = x.abs().flatten().kthvalue(n - keep + 1).values
    return torch.where(x.abs() >= least, x, 0)


def drop(x: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Every element kept with probability `density`, and divided by it: the mean stays (Yu et al. 2023, arXiv:2311.03099)."""
    if density >= 1:
        return x
    return torch.where(torch.rand(x.shape, generator=generator).to(x.device) < density, x / density, 0)


def elect(parts: Sequence[Tensor], majority: Majority) -> Tensor:
    """Each element: the mean over those parts that have the elected sign, that of the parts' sum, or of most of them
    (TIES: Yadav et al. 2023, arXiv:2306.01708, section 3)."""
    found = torch.stack(list(parts))
    sign = found.sign()
    elected = torch.where((found if majority == "total" else sign).sum(0) >= 0, 1.0, -1.0)
    agree = sign == elected
    return (found * agree).sum(0) / agree.sum(0).clamp_min(1)


def elementwise(how: str, majority: Majority) -> Callable[[Sequence[Tensor], Sequence[float], Sequence[float], Any], Tensor]:
    """(updates, weights, densities, generators) -> update, for one of "ties", "dare_linear", "dare_ties", "magnitude_prune".

    Weights come before the election, so that a part with a negative weight votes for what it is about to do.
    """

    def made(updates: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], generators: Any) -> Tensor:
        if how.startswith("dare"):
            thinned = [drop(u, d, g) for u, d, g in zip(updates, densities, generators, strict=True)]
        else:
            thinned = [trim(u, d) for u, d in zip(updates, densities, strict=True)]
        weighted = [t * w for t, w in zip(thinned, weights, strict=True)]
        return elect(weighted, majority) if how.endswith("ties") else torch.stack(weighted).sum(0)

    return made


def refuse(name: str, path: str, adapter: object, layer: object) -> WeftError:
    """What to say of an adapter that is no low-rank update."""
    what = f"{type(adapter).__name__} on a {base_class(layer).__name__}"
    return WeftError(
        f"{name!r} at {path or 'the model'} is a {what}, which is no low-rank update of the layer: make one of it first, "
        f"in Python by weft.convert(model, {name!r}, rank=16)"
    )
