"""Capturing the layers' two passes on a card, and what lies in the memory of the graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from weft.kernels.scratch import release

AGAIN = 1.0  # a pool stays reserved between steps and nobody else can use it: an evaluation's logits, say, want room that a step would
# have given back. Graphs are used where as much as this share of the pool is still free beside it.
LARGE = 1 << 20  # numbers of a gradient that takes the card as long to add as a launch takes it

_invalid: list[Any] = []  # graphs whose capture broke off: the allocator may still ask them, so they are never freed
_inside: WeakKeyDictionary[Any, tuple[int, int, int]] = WeakKeyDictionary()  # graphs -> card, bytes that wait for the backward pass, most
_before: dict[int, int] = {}  # card -> peak up to the last capture


class Unfit(Exception):
    """Why there are no graphs: not a failure, the layers run one by one."""


class Graphs:
    """Both passes through the layers for one kind of call.

    x, given: the static inputs.  out, grad: the static output and where its gradient is put.  dx: the gradient of x.
    sums: parameters and their gradients, which the backward pass adds to.
    `forward()` fills out from x and given; `backward()` adds to the parameters' gradients and fills dx, once a `forward()`.
    """

    x: Tensor
    given: list[Tensor]
    out: Tensor
    grad: Tensor
    dx: Tensor | None
    sums: list[tuple[Tensor, Tensor]]

    def forward(self) -> None:
        raise NotImplementedError("graphs come from Card.capture")

    def backward(self) -> None:
        raise NotImplementedError("graphs come from Card.capture")


def add_gradients(out: Tensor, grad: Tensor, x: Tensor, trained: Sequence[Tensor]) -> Tensor | None:
    """Add to the gradients of `trained`, which are there, what the gradient of out makes of them; the gradient of x, if it wants one.

    Small ones all at once: eight adapters of 112 layers had 1792 launches to add theirs one by one. Large ones, as
    those of whole weights are, one by one as they come, so that they are not there all at once; but not where hooks wait for them: the
    engine would call those within the capture, and `weft.step.graph` calls them after each replay.
    """
    heard = any(t._post_accumulate_grad_hooks for t in trained)  # type: ignore[attr-defined]
    if not heard and sum(t.numel() for t in trained) > LARGE * len(trained):
        torch.autograd.backward(out, grad)
        dx, x.grad = x.grad, None
        return dx
    first = [x] if x.requires_grad else []
    made = torch.autograd.grad(out, [*first, *trained], grad, allow_unused=True)
    dx, made = (made[0], made[1:]) if first else (None, made)
    pairs = [(t.grad, g) for t, g in zip(trained, made, strict=True) if t.grad is not None and g is not None]
    alike = [pair for pair in pairs if pair[0].stride() == pair[1].stride()]  # with another among them all would be added one by one
    if alike:
        torch._foreach_add_(*map(list, zip(*alike, strict=True)))
    for there, g in pairs:
        if there.stride() != g.stride():
            there.add_(g)
    return dx


class Captured(Graphs):
    def __init__(self, card: Card, layers: Callable[[], Tensor], x: Tensor, given: list[Tensor], trained: Sequence[Tensor]) -> None:
        self.x, self.given = x, given
        self.there, self.back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with card.capturing(self.there):
            out = layers()
        self.waiting = torch.cuda.memory_allocated(card.device)
        self.grad = torch.empty_like(out, requires_grad=False)
        with card.capturing(self.back):
            self.dx = add_gradients(out, self.grad, x, trained)  # in this thread and the engine's, on the stream that is captured
        self.out = out.detach()

    def forward(self) -> None:
        self.there.replay()

    def backward(self) -> None:
        self.back.replay()


class Card:
    """The memory that all graphs of a run share, and the stream on which they are captured."""

    def __init__(self, device: torch.device, insist: bool) -> None:
        self.device, self.insist = device, insist
        self.index = _index(device)
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.bytes = 0

    def capture(self, layers: Callable[[], Tensor], x: Tensor, given: list[Tensor], trained: Sequence[Tensor]) -> Graphs:
        """The graphs of `layers()`, which reads x and given, and of its backward pass, which adds to the gradients of `trained`.

        Nothing is computed meanwhile.

        Raises Unfit where they would leave too little of the card, and whatever the layers raise in a capture; all is then as before.
        """
        with torch.cuda.device(self.device), self._workspaces():
            release()
            for dtype in {t.dtype for t in trained}:  # the kernel that adds is loaded before the capture
                torch._foreach_add_(*[[torch.zeros(1, dtype=dtype, device=self.device)] for _ in range(2)])
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved()
            remember(self.device)
            torch.cuda.reset_peak_memory_stats()
            made = Captured(self, layers, x, given, trained)
            now = torch.cuda.memory_allocated()  # the output and the gradients, which stay
            _inside[made] = self.index, max(made.waiting - now, 0), max(torch.cuda.max_memory_allocated() - now, 0)
            torch.cuda.reset_peak_memory_stats()
            self.bytes += torch.cuda.memory_reserved() - held
            free = torch.cuda.mem_get_info()[0]
            if free < AGAIN * self.bytes and not self.insist:
                raise Unfit(f"their memory, {self.bytes / 1e9:.1f} GB, would leave {free / 1e9:.1f} GB of the card for everything else")
            return made

    @contextmanager
    def capturing(self, graph: Any) -> Iterator[None]:
        stream = torch.cuda.current_stream()
        try:
            # Other threads, such as one that pins memory, go on with what they do.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            torch.cuda.set_stream(stream)
            self._abandon(graph)
            raise

    def _abandon(self, graph: Any) -> None:
        """Where CUDA calls a capture invalid, torch (2.11, 2.13) gives up before it has told its allocator and generator of the end."""
        with suppress(RuntimeError):  # it was told: the capture itself was sound
            torch._C._cuda_endAllocateToPool(self.index, self.pool)
            torch._C._cuda_releasePool(self.index, self.pool)
            _invalid.append(graph)
            generator = torch.cuda.default_generators[self.index]
            generator.graphsafe_set_state(generator.clone_state())

    @contextmanager
    def _workspaces(self) -> Iterator[None]:
        """cuBLAS keeps one for each stream and thread, of 32 MB: those of the capture shall not outlive the graphs in their pool."""
        torch._C._cuda_clearCublasWorkspaces()
        try:
            yield
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def close(self, graphs: dict[Any, Graphs]) -> None:
        """Let graphs and pool go."""
        remember(self.device)
        graphs.clear()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def able(device: torch.device) -> bool:
    """Whether graphs can be captured there."""
    return device.type == "cuda" and torch.version.cuda is not None


# ---- what a step takes ----


def peak_memory(device: torch.device) -> int:
    """The most bytes that were taken on a card since `reset_peak_memory`. A replay allocates nothing, so the allocator's own figure
    (`torch.cuda.max_memory_allocated`) does not see what lies inside graphs."""
    return max(_before.get(_index(device), 0), recent_peak(device))


def recent_peak(device: torch.device) -> int:
    """The same since the allocator's own figure began anew."""
    index = _index(device)
    inside = [(waiting, most) for card, waiting, most in _inside.values() if card == index]
    waiting, most = (max(column) for column in zip((0, 0), *inside, strict=True))
    # Beside what waits for the backward pass stands the loss; beside the most of the backward pass only what stays.
    return max(torch.cuda.max_memory_allocated(index) + waiting, torch.cuda.memory_allocated(index) + most)


def reset_peak_memory(device: torch.device) -> None:
    """Count from here on."""
    _before.pop(_index(device), None)
    torch.cuda.reset_peak_memory_stats(device)


def remember(device: torch.device) -> None:
    """Keep the peak up to here, though the allocator's own figure begins anew or graphs go."""
    _before[_index(device)] = peak_memory(device)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()
