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
from weakref import ref

import torch
import torch._functorch.config as aot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.core import base_class
from weft.step.graph import Chain
from weft.step.warming import compiler

logger = logging.getLogger("weft")


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
        offload: keep what the layer keeps in the host's memory meanwhile.
        chain: all layers may run at once, as CUDA graphs.
    """

    def __init__(
        self, layer: nn.Module, compile: bool, varying: bool, recompute: bool, offload: Offload | None, chain: Chain | None = None
    ) -> None:
        self.layer, self.compile, self.recompute, self.offload, self.chain = layer, compile, recompute, offload, chain
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
        with self.offload.hooks(self.layer) if self.offload is not None else nullcontext():
            if self.recompute:
                return checkpoint(self.run, *args, use_reentrant=False, determinism_check="none", **kwargs)
            return self.run(*args, **kwargs)


class Kept:
    """A tensor in the host's memory, and where it is to come back to."""

    def __init__(self, host: Tensor, device: torch.device, layer: Away) -> None:
        self.host, self.device, self.layer = host, device, layer
        self.back: Tensor | None = None


class Away:
    """What one call of a layer keeps; lives as long as the graph does."""

    def __init__(self) -> None:
        self.kept: list[ref[Kept]] = []
        self.leaving: list[Tensor] = []  # held until they are copied out
        self.left: torch.cuda.Event | None = None  # behind the copies out
        self.fetched: torch.cuda.Event | None = None  # behind the copies back, once they are under way


class Offload:
    """What layers keep for the backward pass waits in pinned host memory and comes back one layer ahead of its use.

    A layer of an 8-billion Llama takes about 6 ms for 8192 tokens, in which PCIe 5 moves some 300 MB: its input (67 MB) and three times
    as much again spares half of what would be computed again.

    The host is far ahead of the card, so memory is handed on in the order of the card's work and not by what is done already: all of it
    is from the main stream, which waits for the copies out of a layer before the next layer but one begins, and for those back before use.
    """

    LEAST = 1 << 22  # bytes; smaller tensors stay where they are

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pinned: dict[tuple[Any, ...], list[Tensor]] = {}  # buffers to use again: pinning costs more than copying
        self.layers: list[ref[Away]] = []  # in the order of the forward pass
        self.last: Away | None = None  # whose tensors are leaving

    @contextmanager
    def hooks(self, layer: nn.Module) -> Iterator[None]:
        own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
        away = Away()
        self.layers = [*(r for r in self.layers if r() is not None), ref(away)]

        def pack(t: Tensor) -> Tensor | Kept:
            small = t.numel() * t.element_size() < self.LEAST or 0 in t.stride()
            return t if not t.is_cuda or small or t.untyped_storage().data_ptr() in own else self._out(t, away)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._in):
            yield
        away.left = self.stream.record_event()
        self._gone(self.last)
        self.last = away

    def _gone(self, away: Away | None) -> None:
        if away is not None and away.left is not None:
            torch.cuda.current_stream().wait_event(away.left)
            away.leaving.clear()

    def _out(self, t: Tensor, away: Away) -> Kept:
        free = self.pinned.setdefault((t.shape, t.stride(), t.dtype), [])
        host = free.pop() if free else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(t, non_blocking=True)
        kept = Kept(host, t.device, away)
        away.leaving.append(t)
        away.kept.append(ref(kept))
        return kept

    def _fetch(self, away: Away) -> None:
        if away.fetched is not None:
            return
        coming = [kept for r in reversed(away.kept) if (kept := r()) is not None]
        for kept in coming:
            kept.back = torch.empty_strided(kept.host.shape, kept.host.stride(), dtype=kept.host.dtype, device=kept.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for kept in coming:
                assert kept.back is not None
                kept.back.copy_(kept.host, non_blocking=True)
        away.fetched = self.stream.record_event()

    def _in(self, kept: Tensor | Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.last is not None:  # the backward pass begins
            self._gone(self.last)
            self.last = None
        self._fetch(kept.layer)
        if any(r() is kept.layer for r in self.layers):  # the first of its layer to be asked for: the layer before it is next
            while self.layers and self.layers.pop()() is not kept.layer:
                pass
            before = self.layers[-1]() if self.layers else None
            if before is not None:
                self._fetch(before)
        if kept.back is None or kept.layer.fetched is None:
            raise RuntimeError("what a layer kept was read twice: a graph whose activations are in the host's memory gives gradients once")
        torch.cuda.current_stream().wait_event(kept.layer.fetched)
        back, kept.back = kept.back, None
        self.pinned[(back.shape, back.stride(), back.dtype)].append(kept.host)
        return back


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


def install(
    layers: list[nn.Module], compile: bool, varying: bool, recompute: int, offload: bool, budget: float, chain: Chain | None = None,
    ahead: bool = False,
) -> None:  # fmt: skip
    """Give the layers their regions; the first `recompute` of them are recomputed.

    budget: as for `settle`. ahead: a graph for it is there already (`weft.step.twin`).
    """
    if compile:
        settle(budget)
        if not ahead:
            torch._dynamo.reset()  # graphs of another budget
    away = Offload() if offload else None
    for i, layer in enumerate(layers):
        region = Region(layer, compile, varying, i < recompute, away, chain)
        layer._compiled_call_impl = region
        if chain is not None:
            chain.regions.append(region)


def uninstall(layers: list[nn.Module], settings: bool = True) -> None:
    """Give the layers their own calls back, and torch its settings."""
    while settings and _before:
        config, name, value = _before.pop()
        setattr(config, name, value)
    for layer in layers:
        layer._compiled_call_impl = None
