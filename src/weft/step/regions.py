"""Regions: the repeated layers of a model, each compiled by itself, and recomputed in the backward pass where memory is short.

All layers of one kind share one compiled graph, so compiling takes seconds and not minutes, and works with any adapter's forward.
A region takes the place of the layer's own call (`_call_impl`), so that the model, its hooks and its sites stay as they are.

What a layer keeps for its backward pass is the compiler's choice within a budget. With a budget of 0 it keeps its input and computes
again what the backward pass reads, and only that: the last product of a layer, which nobody needs, is not among it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from threading import local
from typing import Any

import torch
import torch._functorch.config as aot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.core import base_class
from weft.step.graph import Chain
from weft.step.offload import Offload, unpin
from weft.step.warming import compiler

logger = logging.getLogger("weft")
AHEAD = 2  # layers, in which what a spaced lender lent comes back: one layer of an 8-billion Llama takes 9 ms back, its copy 14


def repeated(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the members of every outermost module list whose members are of one class and hold parameters."""
    found: list[nn.Module] = []
    stack: list[nn.Module] = [model]
    while stack:
        module = stack.pop()
        members = list(module.children())
        alike = isinstance(module, nn.ModuleList) and len({base_class(m) for m in members}) == 1
        if alike and next(members[0].parameters(), None) is not None:
            found += members
        else:
            stack += reversed(members)
    return found


def trains(layer: nn.Module) -> bool:
    """Whether something in it is trained, or an adapter at work, which may have what it trains elsewhere."""
    return any(p.requires_grad for p in layer.parameters()) or any(getattr(m, "plan", None) is not None for m in layer.modules())


def lowest(layers: list[nn.Module]) -> nn.Module:
    """The first of them in which something is trained: those before it have no backward pass."""
    return next(filter(trains, layers), layers[0])


class Unrun(Exception):
    """A graph was compiled, within `unrun`."""


_here = local()


@contextmanager
def unrun() -> Iterator[None]:
    """Within it, in this thread, a call of a layer that is compiled ends with `Unrun` when its graph is there."""
    _here.unrun = True
    try:
        yield
    finally:
        _here.unrun = False


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """torch's compiler, as a backend of `torch.compile`."""
    # No choosing by the clock among kernels that sum in different orders: two processes then compute the same numbers to the last bit, a
    # start is 1.5 s shorter, and a step no longer (decision 0010). Said for each graph: torch puts its own setting back behind every one.
    compiled = import_module("torch._inductor.compile_fx").compile_fx(graph, inputs, config_patches={"deterministic": True})

    def run(*args: Any) -> Any:
        if getattr(_here, "unrun", False):
            raise Unrun
        return compiled(*args)

    return run


class Region:
    """What a layer's call does instead.

    Args:
        layer: a module of the model.
        compile: compile it; `varying`: batches differ in shape, so the graph must not depend on it.
        recompute: keep only the layer's input and run the whole layer again in the backward pass.
        offload: what all layers keep goes through it; that of one that `lends` waits in the host's memory.
        chain: all layers may run at once, as CUDA graphs.
    """

    def __init__(
        self, layer: nn.Module, compile: bool, varying: bool, recompute: bool, offload: Offload | None = None, lends: bool = False,
        chain: Chain | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.compile, self.recompute, self.offload, self.lends, self.chain = layer, compile, recompute, offload, lends, chain
        self.run: Callable[..., Any] = torch.compile(layer._call_impl, dynamic=varying, backend=inductor) if compile else layer._call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # evaluation: its shapes are others, and compiling for a forward alone does not pay
            return self.layer._call_impl(*args, **kwargs)
        return self.now(*args, **kwargs) if self.chain is None else self.chain(self, args, kwargs)

    def trains(self) -> bool:
        return trains(self.layer)

    def now(self, *args: Any, **kwargs: Any) -> Any:
        """The layer by itself."""
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad and self.trains():
            # The lowest trained layer's input needs no gradient; saying that it does costs one product and spares compiling a second graph.
            # Layers below it have no backward pass.
            args = (x.detach().requires_grad_(), *args[1:])
        with self.offload.hooks(self.layer, self.lends) if self.offload is not None else nullcontext():
            if self.recompute:
                return checkpoint(self.run, *args, use_reentrant=False, determinism_check="none", **kwargs)
            return self.run(*args, **kwargs)


_before: list[tuple[Any, str, Any]] = []  # torch's settings as they were before `install`, the first one first


def _set(config: Any, name: str, value: Any) -> None:
    _before.append((config, name, getattr(config, name)))
    setattr(config, name, value)


def settle(budget: float) -> None:
    """torch's settings for compiling layers, until `uninstall`.

    budget: share of the activations that a compiled layer keeps (1: all but what is cheap to make again).
    """
    compiler().join()
    _set(aot, "activation_memory_budget", budget)
    takes = import_module("weft.step.budget").Takes()  # only now: it imports the compiler
    _set(aot, "activation_memory_budget_runtime_estimator", takes)
    _set(aot, "is_non_builtin_to_include", True)  # our own operations are weighed like torch's
    # The cache of whole graphs passes by what holds an autograd Function, such as a packed layer's product. It need not: the compiler
    # has traced both its passes by then, and they are part of the key.
    _set(aot, "autograd_cache_allow_custom_autograd_functions", True)
    _set(aot, "force_non_lazy_backward_lowering", True)  # a training step will want it, and what is compiled ahead is not run
    _set(torch._dynamo.config, "recompile_limit", max(64, torch._dynamo.config.recompile_limit))  # kinds of layer, modes, ranks
    # Where shapes vary every float (a scale, an epsilon) would be an input, as a tensor on the CPU: C++ to build in a card's graph.
    _set(torch._dynamo.config, "specialize_float", True)


def lenders(layers: list[nn.Module], share: float) -> list[nn.Module]:
    """About this share of the layers, as far apart as can be, for what they keep to wait elsewhere: none of those whose turn in the
    backward pass comes first, and none below the lowest trained one, which keep nothing (if none of them is trained,
    what comes before them is)."""
    keeping = layers[layers.index(lowest(layers)) :] if layers else []
    return keeping[:-1] if share == 1 else [layer for i, layer in enumerate(keeping[: -AHEAD - 1]) if i * share % 1 < share]


def install(
    layers: list[nn.Module], compile: bool, varying: bool, recompute: int, lent: float, budget: float, chain: Chain | None = None,
    ahead: bool = False,
) -> int:  # fmt: skip
    """Give the layers their regions; the first `recompute` of them are recomputed.

    lent: the share of the layers that keep what they keep in the host's memory meanwhile. budget: as for `settle`. ahead: a graph for it is
    there already (`weft.step.twin`).
    Returns: how many layers lend.
    """
    if compile:
        settle(budget)
        if not ahead:
            torch._dynamo.reset()  # graphs of another budget
    lend = {id(layer) for layer in lenders(layers, lent)}
    offload = Offload(next(layers[0].parameters()).device, 1 if lent == 1 else AHEAD) if lend else None
    for i, layer in enumerate(layers):
        region = Region(layer, compile, varying, i < recompute, offload, id(layer) in lend, chain)
        layer._compiled_call_impl = region
        if chain is not None:
            chain.regions.append(region)
    return len(lend)


def uninstall(layers: list[nn.Module], settings: bool = True) -> None:
    """Give the layers their own calls back, and torch its settings."""
    while settings and _before:
        config, name, value = _before.pop()
        setattr(config, name, value)
    regions = [layer._compiled_call_impl for layer in layers]
    lending = {region.offload.device for region in regions if isinstance(region, Region) and region.offload is not None}
    del regions[:]  # they hold the buffers
    for layer in layers:
        layer._compiled_call_impl = None
    for device in lending:
        unpin(device)
