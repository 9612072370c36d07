"""What trains, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from weft.adapters.attach import active, attached, names
from weft.adapters.targets import listing
from weft.core import behind, logical, modules


@dataclass(frozen=True)
class Part:
    """One named adapter: its method, its parameters, and the layers it stands on ("q_proj (Linear × 32)")."""

    name: str
    method: str
    parameters: int
    active: bool
    layers: str


@dataclass(frozen=True)
class Summary:
    """Counts of a model's parameters. `str()` is the line that peft prints, followed by a line for each adapter."""

    trainable: int
    base: int
    adapters: tuple[Part, ...]

    @property
    def total(self) -> int:
        """All parameters, the base's and the adapters'."""
        return self.base + sum(part.parameters for part in self.adapters)

    @property
    def line(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: {share:.4f}"

    def __str__(self) -> str:
        parts = [
            f"  {part.name}{'' if part.active else ' (not active)'}: {part.method}, {part.parameters:,d} parameters on {part.layers}"
            for part in self.adapters
        ]
        return "\n".join([self.line, *parts])


def summary(model: nn.Module) -> Summary:
    """Parameters of the base and of each adapter, and how many of them train."""
    working, inner = active(model), behind(model)
    parts, counted = [], 0
    for name in names(model):
        found = attached(model, name)
        own = {id(p): p.numel() for adapter in found.values() for p in adapter.parameters()}
        method = next(iter(found.values())).method
        layers = listing({path: inner.get_submodule(path) for path in found}, most=8)
        parts.append(Part(name, type(method).__name__, sum(own.values()), name in working, layers))
        counted += sum(own.values())
    everything = {id(p): p for p in model.parameters()}.values()
    trainable = sum(p.numel() for p in everything if p.requires_grad)
    packed = {  # a byte of a 4-bit weight is two numbers
        id(p): logical(m, key)[0].numel() - p.numel() for _, m in modules(model) for key, p in m._parameters.items() if p is not None
    }
    return Summary(trainable, sum(p.numel() for p in everything) + sum(packed.values()) - counted, tuple(parts))
