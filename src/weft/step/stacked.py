"""Linear layers that are given the very same input (q, k and v; gate and up) as one product, their adapters' part included.

Their frozen weights come to lie in one tensor with room for their adapters (`weft.kernels.stacked_added`), above a copy of the adapters' A
where a gated MLP adds the rest itself (`weft.kernels.stacked`), or beside one where they multiply in fp8 (`weft.kernels.fp8_stacked`). A
layer's own weight is a view of its part, so whatever else reads it finds it as it was. The module around them runs its own forward with a
stand-in for itself, whose q, k and v hand out what one product made; the model's code stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.kernels.fp8_gemm import E4M3
from weft.kernels.fp8_stacked import fp8_stacked
from weft.kernels.keep import keep
from weft.kernels.stacked import EIGHT, padded, stacked
from weft.kernels.stacked_added import FUSED, stacked_added
from weft.quant import QuantLinear
from weft.step.gated import STACK, factors, finished, usual
from weft.step.placed import apart, forward_of, in_one_piece, put, take


class Stack:
    """Layers of one input. What is traced of it are tensors, layers and numbers that are alike in all of a kind, which share one graph."""

    def __init__(self, names: tuple[str, ...], layers: list[Any]) -> None:
        self.names, self.layers = names, layers
        self.plans = [getattr(layer, "plan", None) for layer in self.layers]
        self.outs = [int(layer.out_features) for layer in self.layers]
        self.ranks = [0 if plan is None else len(plan.A) for plan in self.plans]
        self.rank = padded(sum(self.ranks))
        self.on = False  # within `working`: W holds the A's as they are
        self.fp8 = isinstance(layers[0], QuantLinear)
        self.W: Tensor | None = None
        self.scale: Tensor | None = None  # of fp8, a row
        self.rows: Tensor | None = None  # the A's
        self.held: list[tuple[Any, str, Tensor, int]] = []  # a layer, which of its tensors, that, and where in memory it lies
        self.tails: list[Tensor] = []
        self.handles: list[Any] = []  # of hooks

    def install(self, added: bool) -> None:
        """added: `parts` will be asked for, and not `product`."""
        if self.fp8:
            self.W, self.scale = self._gather("weight").view(E4M3), self._gather("weight_scale")
            self.rows = self.W.new_empty(self.rank, self.W.shape[1], dtype=self.layers[0].dtype)
        elif added:
            self.W = self._gather("weight", self.rank, self.rank)
            for layer in self.layers:  # their rows do not lie end to end
                put(layer)
                self.handles.append(layer.register_state_dict_post_hook(in_one_piece))
            return
        else:
            self.W = self._gather("weight", self.rank)
            self.rows = self.W[sum(self.outs) :]
        # Writes to .data are not counted: they bring the same numbers, and a backward pass may be owed, until somebody steps.
        *tails, rest = self.rows.data.split([*self.ranks, self.rank - sum(self.ranks)])
        self.tails = [t for t in tails if len(t)]
        rest.zero_()

    def _gather(self, name: str, behind: int = 0, beside: int = 0) -> Tensor:
        """A tensor of each layer in one, with so many rows behind and columns beside."""
        tensors = [cast(Tensor, getattr(layer, name)) for layer in self.layers]
        whole = tensors[0].data.new_empty(sum(self.outs) + behind, tensors[0].shape[1] + beside)
        places = whole[: sum(self.outs), : tensors[0].shape[1]].split(self.outs)
        for layer, tensor, place in zip(self.layers, tensors, places, strict=True):
            place.copy_(tensor.data)
            place = apart(place)
            self.held.append((layer, name, tensor, place.data_ptr()))  # first: whoever is interrupted here finds what was moved
            tensor.data = place
        return whole

    def uninstall(self) -> None:
        for _, _, tensor, place in self.held:
            if tensor.data_ptr() == place:
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        for layer in self.layers if self.handles else ():
            take(layer)
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.W, self.scale, self.rows, self.held, self.tails = None, None, None, [], []

    def drop(self) -> None:
        """Let go of the weights, where the layers will not be called again: whoever still knows one of them holds nothing large."""
        for _, _, tensor, _ in self.held:
            tensor.data = tensor.data.new_empty(0)
        self.W, self.scale, self.rows, self.held, self.tails = None, None, None, [], []

    def able(self) -> bool:
        """Whether all of its layers multiply alike: where they are in fp8, each of them still does so."""
        return all(layer.narrow for layer in self.layers) if self.fp8 else True

    def valid(self) -> bool:
        """Whether the same adapters work on the same frozen weights as when it was installed, and drop nothing now."""
        return (
            self.W is not None
            and all(getattr(layer, "plan", None) is plan for layer, plan in zip(self.layers, self.plans, strict=True))
            and all(usual(layer) for layer, plan in zip(self.layers, self.plans, strict=True) if plan is not None)
            and all(getattr(layer, name) is t and t.data_ptr() == place and not t.requires_grad for layer, name, t, place in self.held)
        )

    def masters(self) -> list[Tensor]:
        """What `rows` are copies of."""
        return [plan.A for plan in self.plans if plan is not None and self.rows is not None]

    def product(self, x: Tensor) -> Tensor:
        """[y_1 | y_2 | … | S], nothing added to the y's."""
        assert self.W is not None and self.rows is not None
        if self.scale is None:
            return stacked(x, self.W, self.masters())
        return fp8_stacked(x, self.W, self.scale, self.rows, self.masters())

    def _added(self, x: Tensor, D: Tensor) -> Tensor:
        """The same with S Dᵀ added to the y's."""
        assert self.W is not None
        if self.scale is not None:
            assert self.rows is not None
            return fp8_stacked(x, self.W, self.scale, self.rows, self.masters(), D)
        A = torch.cat([plan.A.to(x.dtype) for plan in self.plans if plan is not None])
        return stacked_added(x, self.W, F.pad(A, (0, 0, 0, self.rank - len(A))), D)

    def parts(self, x: Tensor) -> list[Tensor]:
        """What each layer makes of x with its adapter."""
        Bs, cs, before = [], [], 0
        for layer, plan, rank, out in zip(self.layers, self.plans, self.ranks, self.outs, strict=True):
            _, B, c = (None, x.new_zeros(out, 0), None) if plan is None else factors(layer, x.dtype)
            Bs.append(F.pad(B, (before, self.rank - before - rank)))
            cs.append(c)
            before += rank
        made = []
        Z = self._added(x, torch.cat(Bs))
        for name, layer, c, y in zip(self.names, self.layers, cs, Z.split([*self.outs, *self.rest()], -1), strict=False):
            if name == "v_proj" and c is None and layer.bias is None:  # attention keeps v as it is: a view would hold all of Z
                y = keep(y)
            made.append(finished(layer, c, y))
        return made

    def rest(self) -> list[int]:
        """How what is behind the layers' parts is cut.

        The gradient of Z is put together of as many parts. Up to eight the compiler writes by one kernel that asks of each element which
        it is in, five times as slow as kernels of their own, each of which writes to its place.
        """
        pieces = FUSED + 1 - len(self.outs)
        return [EIGHT] * (pieces - 1) + [self.rank - EIGHT * (pieces - 1)]


class Stand:
    """A module as its own forward sees it: its layers hand out their parts of one product."""

    def __init__(self, module: Any, stack: Stack) -> None:
        self.module, self.stack = module, stack
        self.x: Tensor | None = None
        self.parts: list[Tensor] = []
        for i, name in enumerate(stack.names):
            setattr(self, name, Hand(self, stack.layers[i], i))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Hand:
    """One of its layers."""

    def __init__(self, stand: Stand, layer: Any, i: int) -> None:
        self.stand, self.layer, self.i = stand, layer, i

    def __call__(self, x: Tensor) -> Tensor:
        stand = self.stand
        if stand.x is None:
            stand.x, stand.parts = x, stand.stack.parts(x)
        return stand.parts[self.i] if x is stand.x else self.layer(x)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    stack = getattr(self, STACK)
    return type(self).forward(Stand(self, stack) if stack.on and torch.is_grad_enabled() else self, *args, **kwargs)


def install(stacks: Mapping[nn.Module, Stack], mlps: Container[nn.Module]) -> None:
    """mlps: those that see for themselves (`weft.step.gated`)."""
    for module, stack in stacks.items():
        put(module, **{STACK: stack})
        stack.install(module not in mlps)
        if module not in mlps:
            forward_of(module, _forward)
    _tidy(stacks)


def uninstall(stacks: Mapping[nn.Module, Stack]) -> None:
    installed = {module: stack for module, stack in stacks.items() if STACK in vars(module)}
    for module, stack in installed.items():
        take(module, STACK, "forward")
        stack.uninstall()
    _tidy(installed)


def _tidy(stacks: Mapping[nn.Module, Stack]) -> None:
    """What the weights lay in before is of sizes that nothing else has."""
    if any(stack.layers[0].weight.is_cuda for stack in stacks.values()):
        torch.cuda.empty_cache()


@contextmanager
def working(stacks: Mapping[nn.Module, Stack]) -> Iterator[None]:
    """Within it, layers are stacked where the adapters and weights are still those of `install`; their A's are copied first."""
    valid = [stack for stack in stacks.values() if stack.valid()]
    if tails := [t for s in valid for t in s.tails]:
        with torch.no_grad():
            torch._foreach_copy_(tails, [A for s in valid for A in s.masters()])
    for stack in valid:
        stack.on = True
    try:
        yield
    finally:
        for stack in valid:
            stack.on = False


def named(stacks: Mapping[nn.Module, Stack]) -> str:
    """What is stacked, in words."""
    counts = Counter(stack.names for stack in stacks.values())
    return " and ".join(f"{', '.join(name.removesuffix('_proj') for name in names)} of {n} layers" for names, n in counts.items())
