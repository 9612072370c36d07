"""The self-check: one micro-batch through the fast path and through the plain one must give the same loss and the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# ‖fast - plain‖ / ‖plain‖, for the loss and for each parameter's gradient. In fp32 only the order of sums differs. In 16 bit every
# layer rounds, and the two paths round elsewhere. fp8 rounds both sides of every product to 3 bits of mantissa.
BOUNDS = {"fp32": (1e-4, 1e-2), "16 bit": (1e-2, 0.15), "fp8": (3e-2, 0.6)}


def bounds(model: nn.Module) -> tuple[str, tuple[float, float]]:
    """(kind, (bound of the loss, bound of a gradient)) for the arithmetic of this model's base."""
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers())}
    if torch.float8_e4m3fn in kinds:
        return "fp8", BOUNDS["fp8"]
    kind = "16 bit" if kinds & {torch.bfloat16, torch.float16} else "fp32"
    return kind, BOUNDS[kind]


def measure(loss: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]) -> tuple[float, dict[str, Tensor]]:
    """The loss of one pass and every parameter's gradient; gradients are zero afterwards."""
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    grads = {}
    for name, p in parameters.items():
        if p.grad is not None:
            grads[name] = p.grad.detach().clone()
            p.grad.zero_()
    return float(value.detach()), grads


def differences(
    fast: tuple[float, dict[str, Tensor]], plain: tuple[float, dict[str, Tensor]], limits: tuple[float, float]
) -> tuple[float, float, list[str]]:
    """(relative difference of the losses, the worst of a gradient, what is beyond its limit, one line each).

    A gradient that is small beside the largest one is measured against a hundredth of that.
    """
    losses = abs(fast[0] - plain[0]) / max(abs(plain[0]), 1e-6)
    wrong = [] if losses <= limits[0] else [f"the loss is {fast[0]:.6g} and should be {plain[0]:.6g}"]
    norms = {name: float(g.float().norm()) for name, g in plain[1].items()}
    floor = max(norms.values(), default=0.0) / 100
    worst = 0.0
    for name, g in plain[1].items():
        apart = float((fast[1][name].float() - g.float()).norm()) / max(norms[name], floor, 1e-20) if name in fast[1] else float("inf")
        worst = max(worst, apart) if apart == apart else float("inf")
        if not apart <= limits[1]:
            wrong.append(f"{name}: its gradient is off by {apart:.2g} of its size")
    return losses, worst, wrong


@contextmanager
def stirred(parameters: Mapping[str, nn.Parameter], device: torch.device) -> Iterator[None]:
    """Adapters start as the identity by a factor of zero, which hides the other factor's gradient: fill it for the time of the check."""
    zero = [p for p in parameters.values() if not p.detach().any()]
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in zero:
                p.copy_(0.01 * torch.randn(p.shape, device=p.device))
        try:
            yield
        finally:
            with torch.no_grad():
                for p in zero:
                    p.zero_()
