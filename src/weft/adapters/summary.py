"""What trains, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from weft.adapters.attach import active, attached, names
from weft.adapters.files import HEADED, task_of
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
    """Counts of a model's parameters. `str()` is the line that peft prints, followed by a line for each adapter and one for each note."""

    trainable: int
    base: int
    adapters: tuple[Part, ...]
    notes: tuple[str, ...] = ()  # what the user may have overlooked: a classifier's head that no adapter trains

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
        return "\n".join([self.line, *parts, *(f"  {note}" for note in self.notes)])


def summary(model: nn.Module) -> Summary:
    """Parameters of the base and of each adapter, and how many of them train."""
    working, here = active(model), dict(modules(model))
    parts, counted = [], 0
    for name in names(model):
        found = attached(model, name)
        own = {id(p): p.numel() for adapter in found.values() for p in adapter.parameters()}
        method = next(iter(found.values())).method
        layers = listing({path: here[path] for path in found}, most=8)
        parts.append(Part(name, type(method).__name__, sum(own.values()), name in working, layers))
        counted += sum(own.values())
    everything = {id(p): p for p in model.parameters()}.values()
    trainable = sum(p.numel() for p in everything if p.requires_grad)
    packed = {  # a byte of a 4-bit weight is two numbers
        id(p): logical(m, key)[0].numel() - p.numel() for m in here.values() for key, p in m._parameters.items() if p is not None
    }
    base = sum(p.numel() for p in everything) + sum(packed.values()) - counted
    return Summary(trainable, base, tuple(parts), _heads(behind(model), working))


def _heads(model: nn.Module, working: tuple[str, ...]) -> tuple[str, ...]:
    """A note on the heads of a classifier that none of the working adapters trains: transformers makes them at random for a new task."""
    if not working or task_of(model) not in HEADED:
        return ()
    body, everything = getattr(model, "base_model", None), dict(modules(model))
    beside = {p: m for p, m in everything.items() if p and "." not in p and (p == "qa_outputs" if body is model else m is not body)}
    heads = {p: sum(q.numel() for q in m.parameters()) for p, m in beside.items()}
    trained = {p.partition(".")[0] for name in working for p in attached(model, name)}
    trained |= {p for p in heads if any(q.requires_grad for q in model.get_submodule(p).parameters())}
    idle = [p for p, count in heads.items() if count and p not in trained]
    if not idle:
        return ()
    which, verb = " and ".join(f"{p} ({heads[p]:,d} parameters)" for p in idle), "is" if len(idle) == 1 else "are"
    wanted = repr(idle[0]) if len(idle) == 1 else repr(idle)
    made = "made at random unless the base was trained for this task"
    return (f"{which} {verb} not trained: {made}; modules_to_save={wanted} trains {'it' if len(idle) == 1 else 'them'} whole",)
