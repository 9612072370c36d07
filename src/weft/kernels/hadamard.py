"""x H, the Walsh-Hadamard transform of length n = 2ᵏ, in O(n log n): H is a Kronecker product of k copies of [[1, 1], [1, -1]]."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 64  # a product with a dense 64 × 64 matrix beats six passes of sums and differences


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def hadamard_matrix(n: int, like: Tensor) -> Tensor:
    """H (n, n), n a power of two, with entries ±1, in the dtype and on the device of `like`."""
    H = like.new_ones(1, 1)
    two = like.new_tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(H) < n:
        H = torch.kron(H, two)
    return H


def hadamard_reference(x: Tensor) -> Tensor:
    """The same by the matrix itself."""
    return x @ hadamard_matrix(x.shape[-1], x)


def hadamard(x: Tensor) -> Tensor:
    """x H for rows x (..., n), without normalisation: applied twice it gives n x. H is symmetric, so this is its own transpose.

    Raises ValueError unless n is a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Walsh-Hadamard transform has a length that is a power of two, not {n}")
    shape, after = x.shape, 1
    while after < n:
        size = min(_CHUNK, n // after)
        x = (hadamard_matrix(size, x) @ x.reshape(-1, size, after)).reshape(shape)
        after *= size
    return x
