"""What layers keep for the backward pass waits in pinned host memory, and comes back before its use.

A layer of an 8-billion Llama takes about 5 ms for 8192 tokens forward and twice that back, in which PCIe 5 moves some 300 MB either way. So
every fourth layer can lend all that it keeps (0.7 GB) while the other three work; and where layers are computed again, each can
lend its input (67 MB) and three times as much again, which spares half of what would be computed.

The host is far ahead of the card, so memory is handed on in the order of the card's work and not by what is done already: all of it
is from the main stream, which waits for the copies out of a layer before those of the next one that lends, and for those back before use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

LEAST = 1 << 22  # bytes; smaller tensors stay where they are
HOST = 0.8  # of the host's memory that is free may be pinned: nobody else gets it then


class Kept:
    """A tensor that a layer keeps: in the host's memory, or (host is None) where it was, to tell when its layer's turn comes."""

    def __init__(self, layer: Away, back: Tensor | None = None, host: Tensor | None = None, done: Callable[[], None] | None = None) -> None:
        self.layer, self.back, self.host, self.done = layer, back, host, done
        layer.kept.append(ref(self))

    def __del__(self) -> None:
        if self.done is not None:
            self.done()


class Away:
    """What one call of a layer keeps; lives as long as the graph does."""

    def __init__(self) -> None:
        self.kept: list[ref[Kept]] = []
        self.leaving: list[Tensor] = []  # held until they are copied out
        self.left: Any = None  # the event behind the copies out
        self.absent = False  # from then until the copies back are under way
        self.fetched: Any = None  # the event behind those


class Offload:
    """One run's layers, buffers and stream of copies.

    Args:
        device: where the layers are. On a CPU all happens at once, which is how it is tested.
        ahead: how many layers before its own turn what a layer lent begins to come back.
    """

    def __init__(self, device: torch.device, ahead: int = 1) -> None:
        self.device, self.ahead = device, ahead
        self.on: Any = torch.get_device_module(device)
        self.stream = self.on.Stream()
        self.pinned: dict[int, list[Tensor]] = {}  # buffers to use again, by their size: pinning costs more than copying
        self.bytes, self.most = 0, int(HOST * free_in_host())
        self.layers: list[ref[Away]] = []  # in the order of the forward pass
        self.last: Away | None = None  # whose tensors are leaving

    @contextmanager
    def hooks(self, layer: nn.Module, lends: bool) -> Iterator[None]:
        """Round a layer's forward pass. lends: what it keeps leaves; else it only tells when its turn comes."""
        own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())} if lends else set()
        away = Away()
        self.layers = [*(r for r in self.layers if r() is not None), ref(away)]

        def pack(t: Tensor) -> Kept:
            moves = lends and t.device == self.device and t.numel() * t.element_size() >= LEAST and 0 not in t.stride()
            if moves and t.untyped_storage().data_ptr() not in own:
                return self._out(t, away)
            return Kept(away, t.detach())

        with torch.autograd.graph.saved_tensors_hooks(pack, self._in):
            yield
        if away.leaving:
            away.left, away.absent = self.stream.record_event(), True
            self._gone()
            self.last = away

    def _gone(self) -> None:
        """The card waits until what was leaving has left, and its memory may be taken again."""
        if self.last is not None:
            self.on.current_stream().wait_event(self.last.left)
            self.last.leaving.clear()
            self.last = None

    def _out(self, t: Tensor, away: Away) -> Kept:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        size = extent * t.element_size()
        place = self._place(1 << (size - 1).bit_length())
        host = place[:size].view(t.dtype).as_strided(t.shape, t.stride())
        self.stream.wait_stream(self.on.current_stream())
        with self.on.stream(self.stream):
            host.copy_(t, non_blocking=True)
        away.leaving.append(t.detach())  # or a graph that is given up would live on
        return Kept(away, None, host, partial(self.pinned[len(place)].append, place))

    def _place(self, size: int) -> Tensor:
        """(size,) bytes; torch rounds what it pins to a power of two, so nothing is lost by asking for one."""
        if free := self.pinned.setdefault(size, []):
            return free.pop()
        if self.bytes + size > self.most:
            raise torch.OutOfMemoryError(f"activations would take more than {self.most / 1e9:.1f} GB of the host's memory")
        try:
            place = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
        except RuntimeError as e:
            raise torch.OutOfMemoryError(f"{(self.bytes + size) / 1e9:.1f} GB of the host's memory cannot be pinned: {e}") from e
        self.bytes += size
        return place

    def _fetch(self, away: Away) -> None:
        if not away.absent:
            return
        coming = [(kept, kept.host) for r in reversed(away.kept) if (kept := r()) is not None and kept.host is not None]
        for kept, host in coming:
            kept.back = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.device)
        self.stream.wait_stream(self.on.current_stream())
        with self.on.stream(self.stream):
            for kept, host in coming:
                assert kept.back is not None
                kept.back.copy_(host, non_blocking=True)
        away.fetched, away.absent = self.stream.record_event(), False

    def _in(self, kept: Kept) -> Tensor:
        self._gone()  # the backward pass begins
        away = kept.layer
        self._fetch(away)
        if any(r() is away for r in self.layers):  # the first of its layer to be asked for: the layers before it are next
            while self.layers and self.layers.pop()() is not away:
                pass
            for r in reversed(self.layers[-self.ahead :]):
                if (before := r()) is not None:
                    self._fetch(before)
        if kept.host is None:
            assert kept.back is not None
            return kept.back  # as often as the graph is gone through
        if kept.back is None:
            raise RuntimeError("what a layer kept was read twice: a graph whose activations are in the host's memory gives gradients once")
        self.on.current_stream().wait_event(away.fetched)
        back, kept.back = kept.back, None
        return back


def free_in_host() -> int:
    """Bytes that this process may still take of the host's memory, where the system tells (Linux; in a container what that has left)."""
    known = [1 << 62]
    if (told := Path("/proc/meminfo")).exists():
        known += [int(line.split()[1]) << 10 for line in told.read_text().splitlines() if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    if (most := group / "memory.max").exists() and (limit := most.read_text().strip()).isdigit():
        known.append(int(limit) - int((group / "memory.current").read_text()))
    return min(known)
