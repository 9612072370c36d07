"""The chain of layers as two CUDA graphs, one for the forward and one for the backward pass: the host launches each with one call.

A small model's kernels are over sooner than the host has launched them: 0.6 billion parameters at 8192 tokens have 78 ms of kernels in a
step of 115 on an H100, 8 billion 482 in 495.

The first pass is watched: the layers are a chain if each is given the very tensor that the one before it returned. From then on a pass is
only noted, layer by layer, until the last layer's call: by then all that the layers were given is known. The first pass of a kind (shapes,
types and whatever else is no tensor) runs layer by layer, which compiles; the second is captured; it and later ones are replayed. In the
place of an intermediate result the model gets NaN, so that one that looks at it is wrong for all to see, the self-check first.

What a graph holds are addresses: of the parameters and their gradients, into which a backward pass adds, and of static copies of what the
layers are given. Everything that python decides on the way is frozen in it, so facts that may change (`Chain._facts`) are compared first.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.core import Mixture, Site, Slot, WeftError
from weft.step.capture import Card, Graphs, Unfit
from weft.step.gated import STACK
from weft.step.given import each, kind, like, static, tensors, whole
from weft.step.levels import weights

if TYPE_CHECKING:
    from weft.step.regions import Region

logger = logging.getLogger("weft")
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is given besides the hidden states
KINDS = 4  # of passes that are captured: each takes a second once, and static copies of what it is given; padded rows come in many shapes
CHANGES = 3  # of the facts after a capture, and no more are made: somebody changes them in every step
FLOPS, BRIEF = 7e14, 6e-3  # the host takes 2 to 4 ms to launch a layer both ways; an H100 takes 10 for one of 8 billion at 8192 tokens
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def brief(layers: list[nn.Module], tokens: int, narrow: bool) -> bool:
    """Whether layers are so small that they wait for the host: by four operations a weight and token, in fp8 or 16 bit."""
    return 4 * weights(layers) / max(len(layers), 1) * tokens < BRIEF * FLOPS * (2 if narrow else 1)


class Pass:
    """One pass through the layers; lives as long as its autograd graph. waits: a replayed one's backward pass is still to come."""

    waits = False


class Chain:
    """What the regions of all layers share.

    Args:
        insist: have graphs also where their memory leaves the card little else (`weft.step.capture`).
    """

    def __init__(self, insist: bool = False) -> None:
        self.insist = insist
        self.regions: list[Region] = []
        self.why = ""  # why there are no graphs, once that is known
        self.known = False  # that it is a chain
        self.x: Tensor | None = None  # what the first layer was given in the pass under way
        self.next: Tensor | None = None  # what the next layer is to be given
        self.calls: list[Call] = []
        self.modules: list[nn.Module] = []
        self.held: list[Tensor] = []  # parameters and buffers
        self.facts: Any = None
        self.seen: set[Any] = set()  # kinds of passes that ran layer by layer under these facts
        self.graphs: dict[Any, Graphs] = {}
        self.alive: WeakSet[Pass] = WeakSet()
        self.card: Card | None = None
        self.changes = 0

    def __call__(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One layer's call."""
        if self.why:
            return region.now(*args, **kwargs)
        x = args[0] if args else None
        if region is self.regions[0]:  # what an earlier pass left undone is forgotten
            self.x, self.next, self.calls = x, x, []
        expected = self.regions[len(self.calls)]
        if not isinstance(x, Tensor) or x is not self.next or region is not expected:
            if not self.known:
                self.stop("the layers do not hand hidden states straight from one to the next")
            elif isinstance(x, Tensor) and x is self.next:
                raise WeftError("the model leaves out layers that it went through before: write train.graphs: false")
            return region.now(*args, **kwargs)
        if not self.known:
            out = region.now(*args, **kwargs)
        else:
            out = x if self.calls else x.new_full((), torch.nan).expand(x.shape)
        if type(out) is not Tensor or (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
            self.stop("a layer returns something else than hidden states like those that it is given")
            return out
        self.next = out
        self.calls.append((args[1:], kwargs))
        if len(self.calls) < len(self.regions):
            return out
        first, calls, self.x, self.next, self.calls = self.x, self.calls, None, None, []
        assert first is not None
        if self.known:
            return self._pass(first, calls)
        self._watched(first, calls)
        return self._marked(out, Pass())

    def stop(self, why: str) -> None:
        """No graphs from here on."""
        if not self.why:
            logger.info("the layers do not run as CUDA graphs: %s", why)
        self.close(why)

    def close(self, why: str = "closed") -> None:
        """Give everything back."""
        self.why = self.why or why
        self.x, self.next, self.calls = None, None, []
        self.drop()

    def drop(self) -> None:
        """Give the graphs and their memory back; others may be captured."""
        self.seen.clear()
        if self.card is not None:
            self.card.close(self.graphs)
            self.card = None

    # ---- one pass ----

    def _watched(self, x: Tensor, calls: list[Call]) -> None:
        """It is a chain."""
        self._enumerate()
        if hooked := next((m for m in self.modules if _hooked(m)), None):
            self.stop(f"there are hooks in the layers ({type(hooked).__name__})")
        self.known = True
        self._ready(x, calls)

    def _enumerate(self) -> None:
        self.modules = [m for region in self.regions for m in region.layer.modules() if not isinstance(m, Slot)]

    def _pass(self, x: Tensor, calls: list[Call]) -> Tensor:
        graphs = self._ready(x, calls)
        if graphs is None:
            return self._marked(self._layers(x, calls), Pass())
        wanted, this = x.requires_grad, Pass()
        given = x if wanted else x.detach().requires_grad_()
        out: Tensor = _Replayed.apply(given, graphs, tensors(calls), this, wanted)  # type: ignore[no-untyped-call]
        return self._marked(out, this)

    def _layers(self, x: Tensor, calls: list[Call]) -> Tensor:
        for region, (args, kwargs) in zip(self.regions, calls, strict=True):
            x = region.now(x, *args, **kwargs)
        return x

    def _marked(self, out: Tensor, this: Pass) -> Tensor:
        if out.grad_fn is not None:
            out.grad_fn.metadata["weft"] = this  # type: ignore[index]
            self.alive.add(this)
        return out

    def _ready(self, x: Tensor, calls: list[Call]) -> Graphs | None:
        """The graphs of a pass of this kind; None if it has to run layer by layer."""
        try:
            key = x.requires_grad, like(x), kind(calls, x.device, {})
        except Unfit as e:
            self.stop(str(e))
        if self.why or torch.is_autocast_enabled(x.device.type) or any(_hooked(region.layer) for region in self.regions):
            return None
        if self._facts() != self.facts:
            self.changes += bool(self.graphs)
            self._enumerate()  # adapters may have come
            self.facts = self._facts()
            self.drop()
            if self.changes > CHANGES:
                self.stop("what the layers are made of changes again and again (parameters, adapters or modes)")
                return None
        if key in self.graphs:  # a backward pass that is still to come reads what a replay writes over
            return None if any(p.waits for p in self.alive) else self.graphs[key]
        # Of an earlier pass nothing may be left: its nodes that add gradients are of its stream, which is not the one that is captured.
        if key in self.seen and not self.alive and len(self.graphs) < KINDS:
            return self._captured(key, x, calls)
        self.seen.add(key)
        return None

    def _captured(self, key: Any, x: Tensor, calls: list[Call]) -> Graphs | None:
        self.card = self.card or Card(x.device, self.insist)
        trained = [t for t in self.held if t.requires_grad]
        fresh = [t for t in trained if t.grad is None]
        for t in fresh:  # an address to add to; and the kernel that adds is loaded before the capture
            t.grad = torch.zeros_like(t)
            t.grad.add_(t.grad)
        before, why = [_version(t) for t in trained], ""
        try:
            back = x.requires_grad or self.regions[0].trains() or not trained  # else layers below the lowest trained one have no way back
            given = static(x).requires_grad_(back)
            still = {id(t): static(t) for t in tensors(calls)}
            layers = partial(self._layers, given, each(calls, lambda t: still[id(t)]))
            made = self.card.capture(layers, given, list(still.values()), trained)
            made.sums = [(t, t.grad) for t, was in zip(trained, before, strict=True) if t.grad is not None and _version(t) != was]
            self.graphs[key] = made
        except Unfit as e:
            why = str(e)
        except Exception as e:  # of many types: what layers, compiler or driver cannot do in a capture
            why = f"capturing them failed ({type(e).__name__}: {str(e).strip()[:300]})"
            logger.warning("the layers run one by one and not as CUDA graphs: %s", why)
            logger.debug("the capture that failed", exc_info=True)
        added = {id(t) for graphs in self.graphs.values() for t, _ in graphs.sums}
        for t in fresh:
            if id(t) not in added:
                t.grad = None
        if why:  # only now: what the exception held is gone
            self.stop(why)
        return self.graphs.get(key)

    def _facts(self) -> Any:
        """What the layers' python goes by, where parameters lie, and whether a frozen one was written to."""
        held = (t for m in self.modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        self.held = list({id(t): t for t in held}.values())  # anew: somebody may have put another in the place of one
        plans = [vars(m)["plan"] for m in self.modules if isinstance(m, Site)]
        return (
            [m.training for m in self.modules],
            [_known(plan) for plan in plans],
            [vars(adapter).get("scale") for plan in plans if plan is not None for adapter in getattr(plan, "adapters", (plan,))],
            [vars(m)[STACK].on for m in self.modules if STACK in vars(m)],
            [(t.data_ptr(), t.requires_grad) for t in self.held],
            [t._version for t in self.held if isinstance(t, nn.Parameter) and not t.requires_grad and not t.is_inference()],
        )


def _known(plan: Any) -> Any:
    """What stays the same of it: a batch whose rows are several adapters' has a plan of its own, which says whose lines are where."""
    return (plan.adapters, plan.spans) if isinstance(plan, Mixture) else plan


def _version(t: Tensor) -> int:
    return -1 if t.grad is None else t.grad._version


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS) or any(p is not None and p._backward_hooks for p in module._parameters.values())


class _Replayed(torch.autograd.Function):
    """All layers at once, from x to the last one's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, graphs: Graphs, others: list[Tensor], this: Pass, wanted: bool) -> Tensor:
        for place, given in zip((graphs.x, *graphs.given), (x, *others), strict=True):
            whole(place).copy_(whole(given))
        graphs.forward()
        ctx.graphs, ctx.this, ctx.wanted, this.waits = graphs, this, wanted, True
        return graphs.out.detach()  # the head's backward pass reads it before the next replay writes it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if not ctx.this.waits:
            raise RuntimeError("layers that run as CUDA graphs give their gradients once a pass; prepare(..., graphs=False) keeps more")
        ctx.this.waits = False
        graphs: Graphs = ctx.graphs
        # The graph adds to the tensors that were the gradients when it was captured; somebody may have put None in their place since.
        moved = [(p, g) for p, g in graphs.sums if p.grad is None or p.grad.data_ptr() != g.data_ptr()]
        for _, g in moved:
            g.zero_()
        graphs.grad.copy_(grad)
        graphs.backward()
        for p, g in moved:
            p.grad = g if p.grad is None else p.grad + g
        for p, _ in graphs.sums:  # the engine, which calls them otherwise, does not see the parameters here
            for hook in (p._post_accumulate_grad_hooks or {}).values():
                hook(p)
        # A copy: whoever keeps the gradient keeps it beyond the next replay.
        return graphs.dx.clone() if ctx.wanted and graphs.dx is not None else None, None, None, None, None
