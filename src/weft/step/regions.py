"""Regions: the repeated layers of a model, each compiled by itself, and recomputed in the backward pass where memory is short.

All layers of one kind share one compiled graph, so compiling takes seconds and not minutes, and works with any adapter's forward.
A region takes the place of the layer's own call (`_call_impl`), so that the model, its hooks and its sites stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._functorch.config as aot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.core import base_class


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


class Region:
    """What a layer's call does instead.

    Args:
        layer: a module of the model.
        compile: compile it; `varying`: batches differ in shape, so the graph must not depend on it.
        recompute: keep only the layer's input and run the layer again in the backward pass.
        offload: keep that input in the host's memory meanwhile.
    """

    def __init__(self, layer: nn.Module, compile: bool, varying: bool, recompute: bool, offload: Offload | None) -> None:
        self.layer, self.compile, self.recompute, self.offload = layer, compile, recompute, offload
        self.run: Callable[..., Any] = torch.compile(layer._call_impl, dynamic=varying) if compile else layer._call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # evaluation: its shapes are others, and compiling for a forward alone does not pay
            return self.layer._call_impl(*args, **kwargs)
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad:
            # The first layer's input needs no gradient; saying that it does costs one product and spares compiling a second graph.
            args = (x.detach().requires_grad_(), *args[1:])
        if not self.recompute:
            return self.run(*args, **kwargs)
        with self.offload.hooks(args[0]) if self.offload is not None else nullcontext():
            return checkpoint(self.run, *args, use_reentrant=False, determinism_check="none", **kwargs)


class Offload:
    """Inputs of recomputed layers go to pinned host memory as they are kept and come back one layer ahead of their use.

    A residual of 67 MB (8192 tokens of width 4096) takes about 1.5 ms over PCIe 5, a layer's forward 5: the copies hide.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pinned: list[Tensor] = []  # buffers to use again: pinning costs more than copying
        self.kept: list[dict[str, Any]] = []

    @contextmanager
    def hooks(self, x: Tensor) -> Iterator[None]:
        wanted = x.untyped_storage().data_ptr()

        def pack(t: Tensor) -> Any:
            return self._out(t) if t.is_cuda and t.untyped_storage().data_ptr() == wanted else t

        with torch.autograd.graph.saved_tensors_hooks(pack, self._in):
            yield

    def _out(self, t: Tensor) -> dict[str, Any]:
        host = next((p for p in self.pinned if p.shape == t.shape and p.dtype == t.dtype), None)
        if host is None:
            host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
        else:
            self.pinned = [p for p in self.pinned if p is not host]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(t, non_blocking=True)
        t.record_stream(self.stream)
        slot = {"host": host, "device": t.device, "back": None}
        self.kept.append(slot)
        return slot

    def _fetch(self, slot: dict[str, Any]) -> None:
        if slot["back"] is None:
            with torch.cuda.stream(self.stream):
                slot["back"] = slot["host"].to(slot["device"], non_blocking=True)

    def _in(self, slot: Any) -> Tensor:
        if isinstance(slot, Tensor):
            return slot
        self._fetch(slot)
        torch.cuda.current_stream().wait_stream(self.stream)
        back: Tensor = slot["back"]
        back.record_stream(torch.cuda.current_stream())
        self.kept = [s for s in self.kept if s is not slot]
        slot["back"] = None
        self.pinned.append(slot["host"])
        if self.kept:  # the layer before this one is next
            self._fetch(self.kept[-1])
        return back


def install(layers: list[nn.Module], compile: bool, varying: bool, recompute: int, offload: bool, budget: float) -> None:
    """Give the layers their regions; the first `recompute` of them are recomputed.

    budget: share of the activations that a compiled layer keeps (1: all but what is cheap to make again).
    """
    if compile:
        aot.activation_memory_budget = budget
        torch._dynamo.reset()  # graphs of another budget
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # kinds of layer, modes, ranks
    away = Offload() if offload else None
    for i, layer in enumerate(layers):
        layer._compiled_call_impl = Region(layer, compile, varying, i < recompute, away)


def uninstall(layers: list[nn.Module]) -> None:
    aot.activation_memory_budget = 1.0
    for layer in layers:
        layer._compiled_call_impl = None
