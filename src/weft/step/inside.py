"""What stands in for forwards in a compiled step: of fused MLPs, stacked layers, layers that are one operation with their adapter, and the
norm behind them all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import nn

from weft.core import WeftError
from weft.step import alone, closing, gated, stacked
from weft.step.check import recomputes
from weft.step.stackable import stacks


@dataclass
class Inside:
    mlps: dict[nn.Module, gated.Way] = field(default_factory=dict)  # gated ones whose inside is one operation, and by what
    stacks: dict[nn.Module, stacked.Stack] = field(default_factory=dict)  # modules of whose layers some are one product
    lone: dict[nn.Module, str] = field(default_factory=dict)  # layers in none of them that are one operation, and their names
    norm: nn.Module | None = None  # behind the last layer, as one kernel
    layers: Sequence[nn.Module] = ()  # those that the model does not compute again by itself

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[nn.Module], narrow: Collection[nn.Module], kernels: bool) -> Inside:
        """What is possible. narrow: layers that may multiply in fp8. kernels: there is a device for Triton's."""
        mlps = gated.gated_mlps(model) if kernels else {}
        groups = stacks(model, mlps, narrow)
        taken = [layer for s in groups.values() for layer in s.layers] + [m for mlp in mlps for m in mlp.children()]
        norm = closing.closing(model, list(layers)) if kernels else None
        return cls(mlps, groups, alone.lone(layers, taken), norm, () if recomputes(model) else layers)

    def install(self) -> None:
        self.stacks = {m: stack for m, stack in self.stacks.items() if stack.able()}  # a layer too far off in fp8 leaves its group alone
        gated.install(self.mlps)
        stacked.install(self.stacks, self.mlps)
        alone.install(self.lone)
        closing.install(self.norm)

    def uninstall(self) -> None:
        closing.uninstall(self.norm)
        alone.uninstall(self.lone)
        stacked.uninstall(self.stacks)
        gated.uninstall(self.mlps)

    def working(self) -> AbstractContextManager[None]:
        """Around every forward pass. WeftError where the model has begun to compute its layers again by itself."""
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            raise WeftError(
                "gradient checkpointing was turned on after weft.step.prepare: turn it on before, or leave it to prepare(..., memory=0)"
            )
        return stacked.working(self.stacks)

    def give_up(self) -> str:
        """Leave out what is the most daring of it, once it is uninstalled; says so, or nothing if nothing is left."""
        if self.stacks or self.lone:
            what = (f"{stacked.named(self.stacks)} are not stacked", f"{alone.named(self.lone)} are not one operation each")
            text = " and ".join(words for words, there in zip(what, (self.stacks, self.lone), strict=True) if there)
            self.stacks, self.lone = {}, {}
        elif self.mlps:
            text, self.mlps = "gated MLPs are not fused", {}
        elif self.norm is not None:
            text, self.norm = "the norm behind the layers is not one kernel", None
        else:
            text = ""
        return text

    def describe(self) -> list[str]:
        parts = [f"{len(self.mlps)} gated MLPs fused"] if self.mlps else []
        parts += [f"{stacked.named(self.stacks)} stacked"] if self.stacks else []
        parts += [f"{alone.named(self.lone)} one operation each"] if self.lone else []
        return parts + ["the norm behind them one kernel"] * (self.norm is not None)

    def copied(self, twins: Mapping[nn.Module, nn.Module]) -> Inside:
        """The same of copies of some modules, by these."""
        return Inside(
            {twins[m]: way for m, way in self.mlps.items() if m in twins},
            {twins[m]: stacked.Stack(s.names, [twins[one] for one in s.layers]) for m, s in self.stacks.items() if m in twins},
            {twins[m]: name for m, name in self.lone.items() if m in twins},
        )
