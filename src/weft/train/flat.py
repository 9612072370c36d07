"""All parameters of an adapter in one flat fp32 buffer.

Parameters, gradients and both moments of AdamW are four vectors of one length. Clipping, stepping, zeroing and the exact checkpoint are
then one operation each, whatever the method and the number of layers; for hundreds of small matrices that also saves hundreds of
launches a step. The adapter's parameters stay ordinary `nn.Parameter`s: their `.data` and `.grad` become views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

ALIGN = 64  # elements; every view starts on a 256-byte border, as a tensor of its own would, so kernels take the same path


class Flat:
    """One buffer for `parameters` (name to parameter, stable order), cut into one contiguous group per learning-rate ratio.

    Args:
        parameters: the adapter's parameters, all on one device; their values are kept.
        scale: the learning-rate ratio of a parameter, by its name (LoRA+: B's is 16, say).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], scale: Callable[[str], float]) -> None:
        ratio = {name: float(scale(name)) for name in parameters}
        self.parameters = {name: parameters[name] for name in sorted(parameters, key=ratio.__getitem__)}  # stable within a ratio
        device = next(iter(parameters.values())).device
        self.offset: dict[str, int] = {}
        size = 0
        edges: dict[float, list[int]] = {}
        for name, p in self.parameters.items():
            self.offset[name] = size
            size += -(-p.numel() // ALIGN) * ALIGN
            edges.setdefault(ratio[name], [self.offset[name], size])[1] = size
        self.data = torch.zeros(size, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.data)
        for name, p in self.parameters.items():
            view = self._view(self.data, name, p)
            view.copy_(p.detach())
            p.data, p.grad = view, self._view(self.grad, name, p)
        self.groups: list[tuple[float, nn.Parameter]] = []
        for r, (start, end) in edges.items():
            group = nn.Parameter(self.data[start:end])
            group.grad = self.grad[start:end]
            self.groups.append((r, group))

    def _view(self, flat: Tensor, name: str, p: Tensor) -> Tensor:
        return flat[self.offset[name] : self.offset[name] + p.numel()].view(p.shape)

    def clip(self, limit: float) -> Tensor:
        """The gradient's norm before clipping, () fp32 on the device; the gradient is scaled down to `limit` when longer (0: never)."""
        norm = self.grad.norm()
        if limit:
            self.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def touched(self) -> None:
        """Let every parameter count a write: what is kept that was derived from it goes by that. The buffer's own counter is not theirs."""
        torch.autograd.graph.increment_version(list(self.parameters.values()))

    def zero_grad(self) -> None:
        self.grad.zero_()

    def release(self) -> None:
        """Give every parameter a tensor of its own again and drop the gradients: the adapter no longer knows this buffer."""
        for p in self.parameters.values():
            p.data, p.grad = p.data.clone(), None


class AdamW:
    """`torch.optim.AdamW(fused=True)` on the groups of a `Flat`, with its state as plain flat tensors."""

    def __init__(self, flat: Flat, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.flat = flat
        groups = [{"params": [p], "lr": 0.0, "ratio": r} for r, p in flat.groups]
        self.torch = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def step(self, lr: float) -> None:
        """One update at learning rate `lr` (times each group's ratio) with the gradient that stands in the buffer."""
        for group in self.torch.param_groups:
            group["lr"] = lr * group["ratio"]
        self.torch.step()

    def state(self) -> dict[str, Tensor]:
        """Masters and moments, each (size,) fp32, and the number of updates, () fp32. Views, not copies."""
        out = {"masters": self.flat.data}
        for i, (_, p) in enumerate(self.flat.groups):
            out |= {f"{key}.{i}": value for key, value in self.torch.state[p].items()}
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`, bit for bit."""
        self.flat.data.copy_(state["masters"])
        for i, (_, p) in enumerate(self.flat.groups):
            mine = {key.removesuffix(f".{i}"): value for key, value in state.items() if key.endswith(f".{i}")}
            if mine:  # empty before the first update
                self.torch.state[p] = {key: value.to(p.device, copy=True) for key, value in mine.items()}
