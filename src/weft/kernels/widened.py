"""A frozen linear layer and its low-rank update as one product, with the update's B in columns beside the weight.

    y = [h | S | 0] [W | D | 0]ᵀ        S = h Aᵀ        D = s B

after LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3). The sum is the product's own, both ways: y is written once, and dh and dS come of one
product, [dh | dS | ·] = dy [W | D | 0]. The zeros let rows begin where kernels want them to (`weft.kernels.stacked`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from weft.kernels.keep import keep
from weft.kernels.stacked import padded


def widened_reference(H: Tensor, W: Tensor, D: Tensor) -> Tensor:
    """The same as two products, by D itself."""
    rank = D.shape[1]
    h, S, _ = H.split((W.shape[1] - padded(rank), rank, padded(rank) - rank), -1)
    return F.linear(h, W[:, : h.shape[-1]]) + F.linear(S, D)


@torch.library.custom_op("weft::widened", mutates_args=())
def _forward(H: Tensor, S: Tensor, W: Tensor, D: Tensor) -> Tensor:
    return H @ W.T


@_forward.register_fake
def _(H, S, W, D):  # type: ignore[no-untyped-def]
    return H.new_empty(H.shape[0], W.shape[0])  # not len(H): that is a number, and the graph would be for so many tokens


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _grads(ctx: Any, dy: Tensor) -> Any:
    S, W = ctx.saved_tensors
    return dy @ W, None, None, (S.T @ dy).T


_forward.register_autograd(_grads, setup_context=_setup)


@register_flop_formula(torch.ops.weft.widened)
def _flops(H_shape: Any, S_shape: Any, W_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * H_shape[0] * W_shape[0] * W_shape[1]  # type: ignore[no-any-return]


def widened(H: Tensor, W: Tensor, D: Tensor) -> Tensor:
    """y (..., out), differentiable in H and D.

    Args:
        H: (..., in + R), h and S and zeros. D: (out, rank), what gets its gradient; its numbers are read in W.
        W: (out, in + R), the frozen weight, D's numbers beside it, and zeros; R is the least multiple of 64 that they fit into.
    """
    flat, rank = H.reshape(-1, H.shape[-1]), D.shape[1]
    S = keep(flat.detach().narrow(1, W.shape[1] - padded(rank), rank))  # for D's gradient, in place of H; its own comes with that of H
    y: Tensor = _forward(flat, S, W, D)
    return y.view(*H.shape[:-1], -1)
