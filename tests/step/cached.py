"""Run twice by test_cached.py, with one folder for the compiler's caches: a step through compiled layers with packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from weft.quant import FORMATS, QuantLinear
from weft.step.regions import install, uninstall


def packed(base: str, inside: int, outside: int) -> QuantLinear:
    return QuantLinear.of(FORMATS[base].pack(torch.randn(outside, inside)), (outside, inside), base, torch.float32)


class Block(nn.Module):
    """A product of each kind that has a backward pass of its own, and a trained scale."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = packed("fp8", 32, 48), packed("nf4", 48, 32)
        self.up.narrow = True
        self.scale = nn.Parameter(torch.rand(48))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.silu(self.up(x)) * self.scale)
        return y


def gradients(layers: list[nn.Module]) -> list[Tensor]:
    x = torch.linspace(-2, 2, 3 * 5 * 32).view(3, 5, 32)
    for layer in layers:
        x = layer(x)
    scales = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return list(torch.autograd.grad(x.sin().sum(), scales))


def main() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Block(), Block()]
    plain = gradients(layers)
    install(layers, True, False, 0, False, 0.99)
    compiled = gradients(layers)
    uninstall(layers)
    for got, want in zip(compiled, plain, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
    found = counters["aot_autograd"]
    print([g.tolist() for g in compiled], *(found[f"autograd_cache_{what}"] for what in ("miss", "hit", "bypass")), sep="\n")


if __name__ == "__main__":
    main()
