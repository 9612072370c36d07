"""y = x Wᵀ with a frozen W in fp8 (e4m3, one scale an output) and x quantised on the way in (one scale a token); its dX likewise.

    y = s_x s_W (q(x) q(W)ᵀ)        q(v) = round_e4m3(v / s),  s = max|v| / 448 along the row

Hopper's fp8 units run at twice the bf16 rate and want both operands contiguous along the summed axis, so the backward product
dX = dY W needs W transposed: it is kept a second time (2 bytes a weight in all, as in bf16), quantised along its other axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) -> (e4m3 (n, k), scale (n, 1) fp32), x ≈ q · scale. A row of zeros keeps a scale that is not zero."""
    scale = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp_min(1e-12)
    return (x.float() / scale).to(E4M3), scale


def _product_reference(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, k) by (m, k) with scales (n, 1) and (1, m) -> (n, m): dequantise and multiply, in fp32."""
    return ((q.float() * scale) @ (w.float() * w_scale.T).T).to(dtype)


def _product(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    if not q.is_cuda:
        return _product_reference(q, scale, w, w_scale, dtype)
    return torch._scaled_mm(q, w.t(), scale_a=scale, scale_b=w_scale, out_dtype=dtype, use_fast_accum=True)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, w_scale: Tensor, wt: Tensor, wt_scale: Tensor) -> Tensor:
        ctx.save_for_backward(wt, wt_scale)
        q, scale = quantise_rows(x)
        return _product(q, scale, w, w_scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        wt, wt_scale = ctx.saved_tensors
        q, scale = quantise_rows(g)
        return _product(q, scale, wt, wt_scale, g.dtype), None, None, None, None


def fp8_linear(x: Tensor, w: Tensor, w_scale: Tensor, wt: Tensor, wt_scale: Tensor) -> Tensor:
    """x Wᵀ, and dX = dY W in the backward pass, both as fp8 products (dequantised and multiplied where there are no such units).

    Args:
        x: (..., in), bf16 on a GPU. w: (out, in) e4m3, w_scale: (1, out) fp32. wt: (in, out) e4m3, wt_scale: (1, in) fp32.
    """
    # Shaped out here, so that what the function returns is no view and an adapter may add onto it in place.
    y: Tensor = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), w, w_scale, wt, wt_scale)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def both_layouts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w, w_scale, wt, wt_scale) of `fp8_linear` for a weight (out, in)."""
    w, s = quantise_rows(weight)
    wt, st = quantise_rows(weight.T.contiguous())
    return w, s.T.contiguous(), wt, st.T.contiguous()


def fits(weight: Any) -> bool:
    """Whether fp8 units can take this weight: both sides multiples of 16."""
    return weight.dim() == 2 and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def can_fp8(device: torch.device) -> bool:
    """Whether the device has fp8 matrix units with a scale a row: Hopper (9.0) and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
