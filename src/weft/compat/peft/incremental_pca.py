"""Principal components of rows that come batch by batch (Ross, Lim, Lin & Yang 2008, "Incremental Learning for Robust Visual Tracking")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class IncrementalPCA:
    """The first directions of all rows seen so far, and what of their variance each explains.

    Of the rows nothing is kept but their mean, their variance and the first `n_components` directions S Vᵀ: a batch X with mean m updates
    them by the singular value decomposition of [S Vᵀ; X - m; √(n k / (n + k)) (μ - m)] for n rows before and k rows now.

    Args:
        n_components: How many directions; at most as many as a batch has rows.
        batch_size: Rows of a batch in `fit`; 5 times the width if None.
        copy, svd_driver: Taken for peft's sake.
        lowrank: Find the directions by subspace iteration (Halko et al. 2011), which is faster for wide inputs.
        lowrank_q, lowrank_niter, lowrank_seed: How many directions that looks at (twice `n_components`), its rounds, and its seed.
    """

    mean_: Tensor
    var_: Tensor
    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    noise_variance_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and lowrank_q is None and n_components is None:
            raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
        if lowrank and lowrank_q is not None and n_components is not None and lowrank_q < n_components:
            raise ValueError("lowrank_q must be greater than or equal to n_components.")
        self.n_components, self.batch_size = n_components, batch_size
        self.lowrank, self.lowrank_niter, self.lowrank_seed = lowrank, lowrank_niter, lowrank_seed
        self.lowrank_q = 2 * (n_components or 0) if lowrank_q is None else lowrank_q
        self.n_samples_seen_ = 0

    def fit(self, X: Tensor, check_input: bool = True) -> IncrementalPCA:
        """Take in all rows (n, width), batch by batch."""
        self.n_samples_seen_ = 0
        for name in ("components_", "mean_", "var_"):
            self.__dict__.pop(name, None)
        size = self.batch_size or 5 * X.shape[1]
        for batch in self.gen_batches(len(X), size, self.n_components or 0):
            self.partial_fit(X[batch])
        return self

    @torch.no_grad()
    def partial_fit(self, X: Tensor, check_input: bool = True) -> IncrementalPCA:
        """Take in one batch (k, width). Raises ValueError for one with fewer rows than there are directions to find."""
        first = not self.n_samples_seen_
        k, width = X.shape
        many = min(k, width) if self.n_components is None else self.n_components
        if not 1 <= many <= width:
            raise ValueError(f"n_components={many} invalid for n_features={width}: it is between 1 and that")
        if many > k:
            raise ValueError(f"n_components={many} must be less or equal to the batch number of samples {k}")
        X = X if X.dtype in (torch.float32, torch.float64) else X.float()
        n, total = self.n_samples_seen_, self.n_samples_seen_ + k
        here = X.mean(0)
        spread = (X - here).double().square().sum(0)
        if first:
            mean, var, rows = here, spread / k, X - here
        else:
            off = self.mean_ - here
            mean = self.mean_ + (here - self.mean_) * (k / total)
            var = (self.var_ * n + spread + off.double().square() * (n * k / total)) / total
            rows = torch.cat((self.singular_values_[:, None] * self.components_, X - here, (n * k / total) ** 0.5 * off[None]))
        S, Vh = self._directions(rows)
        power = S.double().square()
        self.n_samples_seen_, self.mean_, self.var_ = total, mean, var
        self.components_, self.singular_values_ = Vh[:many], S[:many]
        self.explained_variance_ = (power / max(total - 1, 1))[:many].to(S.dtype)
        self.explained_variance_ratio_ = (power / (var.sum() * total))[:many].to(S.dtype)
        rest = power[many:] / max(total - 1, 1)
        self.noise_variance_ = rest.mean().to(S.dtype) if len(rest) else S.new_tensor(0.0)
        return self

    def _directions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.lowrank:
            with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
                if self.lowrank_seed is not None:
                    torch.manual_seed(self.lowrank_seed)
                _, S, V = torch.svd_lowrank(rows, q=min(self.lowrank_q, *rows.shape), niter=self.lowrank_niter)
            Vh = V.T
        else:
            _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()  # the largest entry of each direction is positive
        return S, Vh * signs

    def transform(self, X: Tensor) -> Tensor:
        """(n, n_components) the rows in the directions found."""
        return (X - self.mean_) @ self.components_.T

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice[Any, Any, Any]]:
        """Slices of `batch_size` rows; the last one takes in a rest that is too short."""
        start = 0
        while start < n:
            end = start + batch_size
            end = n if end > n or n - end < min_batch_size else end
            yield slice(start, end)
            start = end
