"""The order of a card's work where layers lend: two streams, noted on a CPU.

Nothing may touch memory whose last use on the other one it does not wait for. Freed memory is used again at once, as by a card's allocator.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.step.test_offload import CPU, Layer, build, gradients, through
from weft.step import levels, offload
from weft.step.offload import Offload


class Line:
    """A stream. count: of its operations; knows: how many of the other's it is behind."""

    def __init__(self) -> None:
        self.count = self.knows = 0

    def wait_stream(self, other: Line) -> None:
        self.wait_event(other.count)

    def wait_event(self, event: int) -> None:
        self.knows = max(self.knows, event)

    def record_event(self) -> int:
        return self.count


class Order(TorchDispatchMode):
    """Every operation is of the stream that is current. races: operations that touch what the other stream may still be at work on."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = Line(), Line()
        self.now = self.main
        self.read: dict[tuple[int, bool], int] = {}  # (address, on the main stream) -> the last operation there that reads it
        self.written: dict[tuple[int, bool], int] = {}
        self.races: list[str] = []
        self.copies = 0

    def current_stream(self, device: object) -> Line:
        return self.now

    @contextmanager
    def stream(self, line: Line) -> Iterator[None]:
        self.now = line
        yield
        self.now = self.main

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        me, mine = self.now, self.now is self.main
        me.count += 1
        self.copies += not mine
        mutated = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info is not None and s.alias_info.is_write]
        writes = {t.untyped_storage().data_ptr() for t in (*tree_leaves(mutated), *tree_leaves(out)) if isinstance(t, Tensor) and t.numel()}
        reads = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel()} - writes
        for at in writes | reads:
            last = max(self.written.get((at, not mine), 0), self.read.get((at, not mine), 0) if at in writes else 0)
            if last > me.knows:
                self.races.append(f"{func} on the {'main' if mine else 'side'} stream")
            (self.written if at in writes else self.read)[at, mine] = me.count
        return out


def order(monkeypatch: pytest.MonkeyPatch, ahead: int) -> tuple[Order, Offload]:
    monkeypatch.setattr(offload, "LEAST", 1)
    how, seen = Offload(CPU, ahead), Order()
    how.on, how.stream = seen, seen.side
    return seen, how


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_touched_before_its_copy_has_ended(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of all kinds, in any order: whole ones, two at once, given up, broken off in either direction, asked for a part."""
    draw = random.Random(seed)
    seen, how = order(monkeypatch, draw.choice([1, 2]))
    layers, every = build(6, 16), draw.choice([1, 2, 3])
    broken: list[int] = []

    def fail(*args: Any) -> None:
        if broken:
            raise KeyError("in the middle")

    layers[3].two.register_full_backward_hook(fail)
    layers[4].two.register_forward_hook(lambda m, args, out: fail() if broken == [2] else None)

    def forward() -> Tensor:
        return through(layers, torch.randn(draw.choice([8, 12]), 5, 16, requires_grad=True), how, lambda i: i % every == 0)

    with seen:
        for kind in [draw.randrange(6) for _ in range(14)]:
            broken[:] = [kind] if kind in (1, 2) else []
            if kind == 2:
                with pytest.raises(KeyError):
                    forward()
                continue
            loss = forward()
            if kind == 1:
                with pytest.raises(KeyError):
                    loss.backward()
            elif kind == 3:
                torch.autograd.grad(loss, [layers[draw.randrange(6)].two.bias])
            elif kind == 4:
                (loss + forward()).backward()
            elif kind == 5:
                loss.backward()
            del loss
        assert seen.copies > 20 and not seen.races, seen.races


def test_a_race_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in ("wait_event", "wait_stream"):
        seen, how = order(monkeypatch, 1)
        with monkeypatch.context() as context:
            context.setattr(Line, broken, lambda self, other: None)
            layers = build(4, 16)
            with seen:
                for _ in range(3):
                    through(layers, torch.randn(8, 5, 16), how, lambda i: True).backward()
            assert seen.races, broken
            gradients(layers)


def passes(layers: list[Layer], device: torch.device, how: Offload) -> None:
    """Whole passes, each after one that breaks off and one that is asked for a part, against the same without lending."""
    for n in (300, 511, 300):
        x = torch.randn(4, n, 512, device=device)
        through(layers, x, None, bool).backward()
        expected = gradients(layers)
        torch.autograd.grad(through(layers, x, how, lambda i: i % 2 == 0), [layers[4].two.bias])
        hook = layers[3].two.register_full_backward_hook(fail)
        with pytest.raises(KeyError):
            through(layers, x + 1, how, lambda i: i % 2 == 0).backward()
        hook.remove()
        for layer in layers:
            layer.zero_grad()
        through(layers, x, how, lambda i: i % 2 == 0).backward()
        for found, right in zip(gradients(layers), expected, strict=True):
            torch.testing.assert_close(found, right)


def fail(*args: object) -> None:
    raise KeyError("in the middle")


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _, how = order(monkeypatch, 2)
    passes(build(6, 512), CPU, how)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a CPU has no streams")
def test_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the last one there is, whichever is current."""
    monkeypatch.setattr(offload, "LEAST", 1 << 16)
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    how = Offload(device, 2)
    assert how.stream.device == device
    passes([layer.to(device) for layer in build(6, 512)], device, how)
    assert how.bytes and all(place.is_pinned() for free in how.pinned.values() for place in free)
    link, products = levels.rates(device)
    assert 1e8 < link < 1e12 and 1e11 < products < 1e16
    del how  # and all that it pinned
    offload.unpin(device)
