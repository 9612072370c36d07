"""y = x Wᵀ with a frozen W in fp8 (e4m3, one scale an output) and x quantised on the way in (one scale a token); its dX likewise.

    y  = s_x s_W (q(x) Wqᵀ)              q(v) = round_e4m3(v / s),  s = max|v| / 448 along the row
    dX = s_g (q(dY ⊙ s_W) Wq)            W's scales lie along the summed axis here, so they go into dY before it is quantised

Both products are with the same bytes Wq, those that the layer stores. Hopper's fp8 units run at twice the bf16 rate and want both
operands contiguous along the summed axis: the backward pass turns Wq round as it comes to it, 2 bytes of memory traffic a weight.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.kernels.launch import kernels, usable

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) -> (e4m3 (n, k), scale (n, 1) fp32), x ≈ q · scale. A row of zeros keeps a scale that is not zero."""
    x = x.float()
    scale = (x.abs().amax(1, keepdim=True) / LARGEST).clamp_min(1e-12)
    return (x / scale).to(E4M3), scale


@torch.library.custom_op("weft::transposed_fp8", mutates_args=())
def transposed(w: Tensor) -> Tensor:
    """w (n, k), one byte an element -> (k, n), contiguous."""
    if not usable(w):
        return w.t().contiguous()
    return kernels().transpose_bytes_triton(w, w.new_empty(w.shape[::-1]))


@transposed.register_fake
def _(w):  # type: ignore[no-untyped-def]
    return w.new_empty(w.shape[::-1])


def fp8_product_reference(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, k) by (m, k) with scales (n, 1) and (1, m) -> (n, m): dequantise and multiply, in fp32."""
    y = (q.float() * scale) @ (w.float() * w_scale.T).T
    return y if y.dtype == dtype else y.to(dtype)  # a `to` that does nothing: see `weft.quant.layers.Product`


def fp8_product(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The same on fp8 units, where q is on a card. out: where to write it, perhaps a wider tensor's first columns."""
    if out is not None and q.is_cuda and _into_columns(q.device):
        return torch._scaled_mm(q, w.t(), scale_a=scale, scale_b=w_scale, out_dtype=dtype, use_fast_accum=True, out=out)
    if q.is_cuda:
        y = torch._scaled_mm(q, w.t(), scale_a=scale, scale_b=w_scale, out_dtype=dtype, use_fast_accum=True)
    else:
        y = fp8_product_reference(q, scale, w, w_scale, dtype)
    return y if out is None else out.copy_(y)


@cache
def _into_columns(device: torch.device) -> bool:
    """Whether torch multiplies by cuBLASLt (Hopper, CUDA 12.9), which heeds the distance from row to row of what it writes into. Some
    of the CUTLASS kernels that it has for other cards do not."""
    built = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return torch.cuda.get_device_capability(device)[0] == 9 and built >= (12, 9)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
        ctx.save_for_backward(w, w_scale)
        return fp8_product(*quantise_rows(x), w, w_scale.T.contiguous(), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        w, w_scale = ctx.saved_tensors
        one = torch.ones(1, w.shape[1], dtype=torch.float32, device=w.device)
        return fp8_product(*quantise_rows(g.float() * w_scale.T), transposed(w), one, g.dtype), None, None


def fp8_linear(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """x Wᵀ, and dX = dY W in the backward pass, both as fp8 products (dequantised and multiplied where there are no such units).

    Args:
        x: (..., in), 16-bit on a GPU. w: (out, in) e4m3. w_scale: (out, 1) fp32.
    """
    # Shaped out here, so that what the function returns is no view and an adapter may add onto it in place.
    y: Tensor = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), w, w_scale)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def fits(weight: Any) -> bool:
    """Whether fp8 units can take this weight: both sides multiples of 16."""
    return weight.dim() == 2 and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def can_fp8(device: torch.device) -> bool:
    """Whether the device has fp8 matrix units with a scale a row: Hopper (9.0) and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
