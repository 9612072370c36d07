"""Which layers of an fp8 base multiply in fp8, and how far each is from its plain product on real inputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.core import modules
from weft.kernels.fp8_gemm import can_fp8, fits
from weft.quant import QuantLinear

# ‖fp8 - plain‖ / ‖plain‖ of one product or its dX. Rounding both sides to 3 bits of mantissa gives 0.037 on normal numbers; a layer that
# is beyond this has rows that span more than fp8's range.
BOUND = 0.08


def narrowable(model: nn.Module, everywhere: bool = False) -> dict[str, QuantLinear]:
    """The layers stored in fp8 with a scale a row whose products fp8 units can take, by path. everywhere: on devices without them too."""

    def can(m: object) -> bool:
        if not isinstance(m, QuantLinear) or m.form.name != "fp8" or not m.is_packed():
            return False
        by_rows = m.tensors()["scale"].shape == (m.out_features, 1)
        return by_rows and fits(m.weight) and (everywhere or can_fp8(m.weight.device))

    return {path: cast(QuantLinear, m) for path, m in modules(model) if can(m)}


@contextmanager
def watched(layers: Sequence[QuantLinear]) -> Iterator[dict[int, float]]:
    """While these layers work plainly: id of a layer -> the larger of the distances of its product and of its dX in fp8 from the plain."""
    worst: dict[int, float] = {}

    def apart(layer: QuantLinear, got: Tensor, want: Tensor) -> None:
        found = float((got - want).float().norm() / want.float().norm().clamp_min(1e-30))
        worst[id(layer)] = max(worst.get(id(layer), 0.0), found if found == found else float("inf"))

    def forward(layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        x: Tensor = args[0].detach()
        with torch.no_grad():
            apart(layer, layer.in_fp8(x), x @ layer.unpacked(dtype=x.dtype).T)

        def backward(g: Tensor) -> None:
            with torch.enable_grad():
                again = x.detach().requires_grad_()
                (got,) = torch.autograd.grad(layer.in_fp8(again), again, g)
            with torch.no_grad():
                apart(layer, got, g @ layer.unpacked(dtype=g.dtype))

        if output.requires_grad:
            output.register_hook(backward)

    handles = [layer.register_forward_hook(forward) for layer in layers]
    try:
        yield worst
    finally:
        for handle in handles:
            handle.remove()
