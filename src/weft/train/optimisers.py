"""Which AdamW moves the flat buffer: what differs is where its two moments lie, and in how many bits.

| `train.optimiser` | bytes a parameter, on the device + on the host | update |
|---|---|---|
| adamw | 8 + 0 | torch's fused AdamW (flat.py) |
| adamw-8bit | 2 + 0 | the same equations on moments that rest in 8 bits, a scale for each 256 |
| adamw-offload | 0 + 8 | the same bits as adamw: the moments rest in pinned memory and visit the device in pieces |
| adamw-paged | up to 8, the driver decides | bitsandbytes' PagedAdamW, where that package is there |
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from weft.core import WeftError
from weft.train.flat import AdamW, Flat

BLOCK = 256  # values that share a scale
PIECE = 1 << 20  # values worked on at once, a multiple of BLOCK: what must lie in fp32 on the device beside the parameters, 4 MiB a moment


class Optimiser(Protocol):
    """What the loop asks of an optimiser. `state` holds "masters" and all else that an exact resume needs."""

    def step(self, lr: float) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


def make(name: str, flat: Flat, betas: tuple[float, float], eps: float, weight_decay: float) -> Optimiser:
    """The optimiser that a recipe names. Raises WeftError for "adamw-paged" without bitsandbytes."""
    kinds = {"adamw": AdamW, "adamw-8bit": AdamW8bit, "adamw-offload": AdamWOffload, "adamw-paged": AdamWPaged}
    return cast(Optimiser, kinds[name](flat, betas, eps, weight_decay))


def dynamic_map(signed: bool) -> Tensor:
    """The 256 ascending values of the dynamic 8-bit type, (256,) fp32 in [-1, 1] or [0, 1] (Dettmers et al. 2022, arXiv:2110.02861, §1.3).

    Decade i of seven, up to 10^(i-6), has 2^i (unsigned: 2^(i+1)) evenly spaced values, the middles of as many equal parts of it; 0 and 1
    are there besides. So small values keep their order of magnitude and large ones some digits.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64) * 10.0 ** (i - 6)
        middles = ((edges[:-1] + edges[1:]) / 2).tolist()
        values += middles + ([-v for v in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


class Bytes:
    """A vector of n fp32 values that rests as 8-bit codes, with the largest magnitude of every BLOCK of them beside it."""

    def __init__(self, n: int, signed: bool, device: torch.device) -> None:
        blocks = -(-n // BLOCK)
        self.n, self.map = n, dynamic_map(signed).to(device)
        self.edges = (self.map[1:] + self.map[:-1]) / 2
        self.codes = torch.full((blocks * BLOCK,), int((self.map == 0).nonzero()), dtype=torch.uint8, device=device)
        self.scale = torch.zeros(blocks, device=device)

    def read(self, start: int, end: int) -> Tensor:
        """Values start..end, fp32; start is a multiple of BLOCK."""
        scale = self.scale[start // BLOCK : -(-end // BLOCK)]
        codes = self.codes[start : start + len(scale) * BLOCK]
        return (self.map[codes.int()].view(-1, BLOCK) * scale[:, None]).view(-1)[: end - start]

    def write(self, start: int, values: Tensor) -> None:
        """The nearest code of each value, from `start` on (a multiple of BLOCK)."""
        short = -len(values) % BLOCK
        rows = torch.nn.functional.pad(values, (0, short)).view(-1, BLOCK)
        scale = rows.abs().amax(1)
        unit = rows / torch.where(scale > 0, scale, 1)[:, None]
        self.scale[start // BLOCK : start // BLOCK + len(rows)] = scale
        self.codes[start : start + rows.numel()] = torch.bucketize(unit, self.edges).view(-1).to(torch.uint8)


def _pieces(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PIECE, n)) for start in range(0, n, PIECE))


class AdamW8bit:
    """AdamW whose moments rest in 8 bits, blockwise (Dettmers et al. 2022): 2.03 bytes a parameter instead of 8.

        m ← β₁m + (1-β₁)g    v ← β₂v + (1-β₂)g²    θ ← θ - lr·λθ - lr·m̂ / (√v̂ + ε)

    Each step's update is computed in fp32 from the moments as they come out of their codes, and only then are they rounded again. What is
    kept of v is its root: the codes reach down seven decades, and v has twice as many as g. Plain torch, for any device.
    """

    def __init__(self, flat: Flat, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.flat, self.betas, self.eps, self.decay = flat, betas, eps, weight_decay
        device = flat.data.device
        self.moments = [(Bytes(p.numel(), True, device), Bytes(p.numel(), False, device)) for _, p in flat.groups]
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate `lr` (times each group's ratio) with the gradient that stands in the buffer."""
        self.steps += 1
        (b1, b2), t = self.betas, self.steps
        for (ratio, p), (first, root) in zip(self.flat.groups, self.moments, strict=True):
            assert p.grad is not None
            for start, end in _pieces(p.numel()):
                g, part = p.grad[start:end], p[start:end]
                m = first.read(start, end).lerp_(g, 1 - b1)
                v = root.read(start, end).square_().mul_(b2).addcmul_(g, g, value=1 - b2)
                part.mul_(1 - lr * ratio * self.decay)
                r = v.sqrt_()
                part.addcdiv_(m, (r / (1 - b2**t) ** 0.5).add_(self.eps), value=-lr * ratio / (1 - b1**t))
                first.write(start, m)
                root.write(start, r)

    def state(self) -> dict[str, Tensor]:
        """Masters (size,) fp32; of both moments of every group codes (blocks·256,) uint8 and scales (blocks,) fp32; the updates done."""
        out = {"masters": self.flat.data, "steps": torch.tensor(self.steps)}
        for i, pair in enumerate(self.moments):
            for key, moment in zip(("m", "v"), pair, strict=True):
                out |= {f"{key}.codes.{i}": moment.codes, f"{key}.scale.{i}": moment.scale}
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`, bit for bit."""
        mine = self.state()
        for key, value in mine.items():
            value.copy_(state[key])
        self.steps = int(mine["steps"])


class AdamWOffload:
    """The fused AdamW, bit for bit, with its moments in the host's memory: the device holds two pieces of them, and only in a step.

    Piece k + 1 comes in and piece k - 1 goes out on a stream of their own (through pinned memory) while piece k is worked on: 16 bytes a
    parameter and step cross the bus. On a CPU nothing is copied anywhere.
    """

    def __init__(self, flat: Flat, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.flat, self.betas, self.eps, self.decay = flat, betas, eps, weight_decay
        self.device = flat.data.device
        self.away = self.device.type == "cuda"
        self.moments = [torch.zeros(2, p.numel(), pin_memory=self.away) for _, p in flat.groups]
        self.steps = 0
        if self.away:
            self.stream = torch.cuda.Stream(self.device)
            self.slots = [torch.empty(2, PIECE, device=self.device) for _ in range(2)]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate `lr` (times each group's ratio) with the gradient that stands in the buffer."""
        work = [(i, start, end) for i, (_, p) in enumerate(self.flat.groups) for start, end in _pieces(p.numel())]
        here = self._fetch(0, *work[0])
        for k, (i, start, end) in enumerate(work):
            coming = self._fetch(k + 1, *work[k + 1]) if k + 1 < len(work) else None
            ratio, p = self.flat.groups[i]
            self._update(p, start, end, here[0], here[1], lr * ratio)
            self._put_back(i, start, end, here[0])
            here = coming if coming is not None else here
        self.steps += 1

    def _fetch(self, k: int, i: int, start: int, end: int) -> tuple[Tensor, Any]:
        """(2, piece) of both moments on the device, in slot k % 2, and the event after which they are there."""
        home = self.moments[i][:, start:end]
        if not self.away:
            return home, None
        slot = self.slots[k % 2][:, : end - start]
        with torch.cuda.stream(self.stream):  # what was in the slot went out on the same stream before
            for to, of in zip(slot, home, strict=True):  # row by row: each is one run of memory, which a copy engine takes
                to.copy_(of, non_blocking=True)
            return slot, self.stream.record_event()

    def _update(self, p: Tensor, start: int, end: int, moments: Tensor, ready: Any, lr: float) -> None:
        if self.away:
            torch.cuda.current_stream(self.device).wait_event(ready)
        assert p.grad is not None
        count = torch.full((), float(self.steps), device=self.device)
        adamw(
            [p[start:end]], [p.grad[start:end]], [moments[0]], [moments[1]], [], [count], fused=True, amsgrad=False, maximize=False,
            beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=self.decay, eps=self.eps,
        )  # fmt: skip

    def _put_back(self, i: int, start: int, end: int, moments: Tensor) -> None:
        if not self.away:
            return
        done = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(done)
            for to, of in zip(self.moments[i][:, start:end], moments, strict=True):
                to.copy_(of, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        """Masters (size,), both moments (2, group) of every group, fp32, and the updates done."""
        if self.away:
            self.stream.synchronize()
        moments = {f"moments.{i}": both for i, both in enumerate(self.moments)}
        return {"masters": self.flat.data, "steps": torch.tensor(self.steps), **moments}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`, bit for bit."""
        mine = self.state()
        for key, value in mine.items():
            value.copy_(state[key])
        self.steps = int(mine["steps"])


class AdamWPaged:
    """bitsandbytes' PagedAdamW on the flat groups: fp32 moments in managed memory, which the driver moves out when the device is full."""

    def __init__(self, flat: Flat, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise WeftError(
                'train.optimiser "adamw-paged" is bitsandbytes\' own, which is not installed: pip install bitsandbytes, or write '
                '"adamw-offload", which keeps the moments in the host\'s memory on every card'
            )
        self.flat = flat
        groups = [{"params": [p], "lr": 0.0, "ratio": r} for r, p in flat.groups]
        kind = importlib.import_module("bitsandbytes.optim").PagedAdamW
        self.theirs = kind(groups, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay)

    def step(self, lr: float) -> None:
        """One update at learning rate `lr` (times each group's ratio) with the gradient that stands in the buffer."""
        for group in self.theirs.param_groups:
            group["lr"] = lr * group["ratio"]
        self.theirs.step()

    def state(self) -> dict[str, Tensor]:
        """Masters (size,), both moments of every group, fp32, and the updates done; no moments before the first."""
        out = {"masters": self.flat.data}
        for i, (_, p) in enumerate(self.flat.groups):
            mine = self.theirs.state.get(p, {})
            out |= {f"{key}.{i}": torch.as_tensor(mine[key]) for key in ("state1", "state2", "step") if key in mine}
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`, bit for bit."""
        self.flat.data.copy_(state["masters"])
        if "step.0" not in state:
            return
        self.theirs.check_overrides()
        self.theirs.initialized = True  # what its first step would do besides: nothing of it is left to do
        for i, (_, p) in enumerate(self.flat.groups):
            self.theirs.init_state(self.theirs.param_groups[i], p, i, 0)  # allocates the moments where it wants them
            for key in ("state1", "state2"):
                self.theirs.state[p][key].copy_(state[f"{key}.{i}"])
            self.theirs.state[p]["step"] = int(state[f"step.{i}"])
