"""What layers keep for the backward pass waits in pinned host memory, and comes back before its use.

A layer of an 8-billion Llama takes about 5 ms for 8192 tokens forward and twice that back, in which PCIe 5 moves some 300 MB either way. So
every fourth layer can lend all that it keeps (0.7 GB) while the other three work; and where layers are computed again, each can
lend its input (67 MB) and three times as much again, which spares half of what would be computed.

The host is far ahead of the card, so memory is handed on in the order of the card's work and not by what is done already: all of it
is from the main stream, which waits for the copies out of a layer before those of the next one that lends, and for those back before use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

LEAST = 1 << 22  # bytes; smaller tensors stay where they are
HOST = 0.8  # of the host's memory that is free may be pinned, by all processes here: nobody else gets it then
GROUPS = {  # control groups, version 2 and 1: where they are, limit, use, and files in memory that can be read again
    "": (".", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class HostFull(torch.OutOfMemoryError):
    """The host has no room for what layers would lend."""


class Kept:
    """A tensor that a layer keeps: lent to the host's memory, or (host is None) where it was, to tell when its layer's turn comes.

    card: the tensor there; of one that is lent, while it leaves, and from its return until it is read.
    """

    def __init__(
        self, layer: Away, card: Tensor, host: Tensor | None = None, stride: tuple[int, ...] = (), done: Callable[[], None] | None = None
    ) -> None:
        self.layer, self.host, self.stride, self.done = layer, host, stride, done
        self.card: Tensor | None = card
        self.version, self.changed = card._version, False

    def __del__(self) -> None:
        if self.done is not None:
            if self.card is not None:  # a pass broke off, or nobody asked for it: no other may have its memory while it is being copied
                self.layer.wait()
            self.done()


class Away:
    """What one call of a layer keeps; lives as long as the graph does. wait: lets the card wait for all copies under way."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.lent: list[ref[Kept]] = []
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
        self.stream = self.on.Stream(device)
        self.pinned: dict[int, list[Tensor]] = {}  # buffers to use again, by their size: pinning costs more than copying
        unpin(device)  # what was another's counts as free
        self.bytes, self.most = 0, int(HOST * free_in_host()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.layers: list[ref[Away]] = []  # in the order of the forward pass
        self.last: Away | None = None  # whose tensors are leaving

    def _main(self) -> Any:
        return self.on.current_stream(self.device)

    @contextmanager
    def hooks(self, layer: nn.Module, lends: bool) -> Iterator[None]:
        """Round a layer's forward pass. lends: what it keeps leaves; else it only tells when its turn comes."""
        away = Away(partial(self._main().wait_stream, self.stream))
        self.layers = [*(r for r in self.layers if r() is not None), ref(away)]
        own: set[int] = set()

        def pack(t: Tensor) -> Kept:
            if not lends or not _plain(t) or t.device != self.device:
                return Kept(away, t.detach())
            if not own:  # only now: where parameters are sharded, these are the ones gathered for this call
                own.update(p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers()) if _plain(p))
            small = t.numel() * t.element_size() < LEAST or 0 in t.stride()
            return Kept(away, t.detach()) if small or t.untyped_storage().data_ptr() in own else self._out(t.detach(), away)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._in):
            yield
        if away.lent:
            away.left, away.absent = self.stream.record_event(), True
            self._gone()
            self.last = away

    def _gone(self) -> None:
        """The card waits until what was leaving has left, and its memory may be taken again."""
        if self.last is not None:
            self._main().wait_event(self.last.left)
            for r in self.last.lent:
                if (kept := r()) is not None and kept.card is not None:
                    kept.changed, kept.card = kept.card._version != kept.version, None
        self.last = None

    def _out(self, t: Tensor, away: Away) -> Kept:
        there = t
        if t.numel() != 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)):
            there = t.contiguous()  # a copy of what has gaps would be one by way of other memory, for which the host waits
        size = there.numel() * there.element_size()
        place = self._place(1 << (size - 1).bit_length())
        host = place[:size].view(t.dtype).as_strided(there.shape, there.stride())
        self.stream.wait_stream(self._main())
        with self.on.stream(self.stream):
            host.copy_(there, non_blocking=True)
        kept = Kept(away, there, host, t.stride(), partial(self.pinned[len(place)].append, place))
        away.lent.append(ref(kept))
        return kept

    def _place(self, size: int) -> Tensor:
        """(size,) bytes; torch rounds what it pins to a power of two, so nothing is lost by asking for one."""
        if free := self.pinned.setdefault(size, []):
            return free.pop()
        if self.bytes + size > self.most:  # buffers of other sizes are in the way, after batches of other shapes
            for other, free in self.pinned.items():
                self.bytes -= other * len(free)
                free.clear()
            unpin(self.device)
        if self.bytes + size > self.most:
            raise HostFull(f"activations would take more than {self.most / 1e9:.1f} GB of the host's memory")
        try:
            place = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
        except RuntimeError as e:
            raise HostFull(f"{(self.bytes + size) / 1e9:.1f} GB of the host's memory cannot be pinned: {e}") from e
        self.bytes += size
        return place

    def _fetch(self, away: Away) -> None:
        if not away.absent:
            return
        coming = [(kept, kept.host) for r in reversed(away.lent) if (kept := r()) is not None and kept.host is not None]
        for kept, host in coming:
            kept.card = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.device)
        self.stream.wait_stream(self._main())
        with self.on.stream(self.stream):
            for kept, host in coming:
                assert kept.card is not None
                kept.card.copy_(host, non_blocking=True)
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
        card = kept.card
        if card is None:
            raise RuntimeError("what a layer kept was read twice: a graph whose activations are in the host's memory gives gradients once")
        if kept.changed or (kept.host is None and card._version != kept.version):  # torch itself leaves this to whoever has hooks
            raise RuntimeError("a tensor that the backward pass needs was changed in place after its layer had kept it")
        if kept.host is None:
            return card  # as often as the graph is gone through
        self._main().wait_event(away.fetched)
        kept.card = None
        return card if card.stride() == kept.stride else card.new_empty_strided(card.shape, kept.stride).copy_(card)


def _plain(t: Tensor) -> bool:
    """Whether its numbers lie in memory as its strides say; a tensor of a class of its own has them elsewhere."""
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided


def unpin(device: torch.device) -> None:
    """Give back what torch has pinned and nobody uses, which it would keep for itself until the process ends."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        (getattr(torch._C, "_host_emptyCache", None) or torch.accelerator.empty_host_cache)()


def free_in_host(root: Path = Path("/")) -> int:
    """Bytes that this process may still take of the host's memory, where the system tells (Linux: what is available, and what each of the
    control groups that it is in has left, files that can be read again not counted). root: of the file system."""
    known = [1 << 62]
    if (told := root / "proc/meminfo").exists():
        known += [int(line.split()[1]) << 10 for line in told.read_text().splitlines() if line.startswith("MemAvailable:")]
    for line in groups.read_text().splitlines() if (groups := root / "proc/self/cgroup").exists() else ():
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in GROUPS:
            continue
        base, most, now, files = GROUPS[kind]
        group = root / "sys/fs/cgroup" / base / path.strip("/")
        for at in (group, *group.parents):  # whichever there are: in a container the path may be the host's
            if (at / now).exists() and (limit := (at / most).read_text().strip()).isdigit():
                again = sum(int(row.split()[1]) for row in (at / "memory.stat").read_text().splitlines() if row.split()[0] == files)
                known.append(int(limit) - int((at / now).read_text()) + again)
    return min(known)
