"""Levels of memory: what is kept for the backward pass, and what is made again or waits in the host's memory."""

from __future__ import annotations

import logging
from functools import cache
from math import prod

import torch
from torch import nn

from weft.core import features, is_linear, modules
from weft.step.loss import Batch

logger = logging.getLogger("weft")
Memory = float | int | str  # "auto", a share (0 to 1), or bytes, also as "40GB"
LEVELS = (1.0, 0.9, 0.75, 0.5, 0.3, 0.1, 0.0)  # share of the activations kept on the card; below RECOMPUTE: little but each layer's input
LENDS = 0.5  # from here on what is not kept on the card waits in the host's memory, and nothing more is made again
RECOMPUTE = 0.2
MOST = 0.99  # of the compiler's budget: below 1 it makes again what no matrix product is needed for, for 0.4% of an 8B step's time,
LEAN = 0.68  # and then keeps this share (25 GB of 37)
THIN = 0.01  # what a layer keeps that is made again: its input, and the thin products of its adapters (weft.step.budget)
AWAY = 0.2  # level 0 keeps this share in the host's memory: what PCIe 5 moves while a layer of an 8-billion Llama works
AGAIN = 0.8  # of a forward pass's time is what making again costs where half is kept (an 8-billion Llama: 27% of a step)
SPARE = 0.9  # of what is free may be planned for: the allocator cuts memory into pieces, and kernels want workspaces


def lent(level: float) -> float:
    """The share of compiled layers on a card that keep what they keep in the host's memory."""
    return 1.0 if level == 0 else 1 - level if level >= LENDS else 0.0


def kept(level: float, lent: float) -> float:
    """The share of its activations that a compiled layer keeps."""
    if level < RECOMPUTE:
        return AWAY if lent else THIN
    return MOST if lent else min(level, MOST)


def told(level: float, lending: int) -> str:
    """What is kept, in words. lending: how many layers keep what they keep in the host's memory."""
    if lending and level:
        return f"activations kept, those of {lending} layers in host memory"
    if level >= RECOMPUTE:
        return "activations kept" if level >= 1 else f"{level:.0%} of the activations kept"
    return "layers recomputed" + (", what they keep in host memory" if lending else "")


def fitting(batch: Batch, memory: float | None, layers: list[nn.Module], compiled: bool) -> float:
    """The share of activations to keep, of what `weft.core.amount` says. On a CPU "auto" keeps all."""
    device = batch.input_ids.device
    if memory is not None and memory <= 1:
        return memory
    if device.type != "cuda":
        return 1.0
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    planned = SPARE * free
    if memory is not None:  # what the step takes will be measured
        planned = min(planned, memory - torch.cuda.memory_allocated(device))
    tokens, lean = batch.input_ids.numel(), LEAN if compiled else 1.0
    need = activation_bytes(layers, tokens)
    share = (planned - need / max(len(layers), 1) - 2**30) / max(need, 1)  # a layer's own temporaries and the loss's slice in any case
    for level in (*LEVELS[:-2], 0.0, LEVELS[-2]):  # where the link is fast, what is kept less of all costs no more time
        moved = need * (AWAY if level == 0 else lean * lent(level) if compiled else 0.0)
        if lean * level <= share and (not moved or pays(2 * weights(layers) * tokens, moved, device)):
            return level
    return 0.0


def pays(operations: float, away: float, device: torch.device) -> bool:
    """Whether lending so many bytes costs less time than making activations again would. operations: of the layers' forward pass."""
    link, products = rates(device)
    copies, forward = away / link, operations / products
    stretched = max(copies - forward, 0) + max(copies - 2 * forward, 0)  # a copy is free while the layers work
    return stretched < AGAIN * forward


@cache
def rates(device: torch.device) -> tuple[float, float]:
    """(bytes a second to pinned memory, operations a second of a large product in 16 bits) of this card, in some 0.1 s."""
    n = 4096
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16)
    try:
        host, y = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.empty_like(x)
    except RuntimeError as e:
        logger.info("nothing is lent to the host, whose memory cannot be pinned: %s", e)
        return 1.0, 1.0
    seconds = []
    with torch.cuda.device(device):  # whose stream the events are of
        for work in (lambda: host.copy_(x, non_blocking=True), lambda: torch.mm(x, x, out=y)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            work()
            start.record()  # type: ignore[no-untyped-call]
            for _ in range(4):
                work()
            end.record()  # type: ignore[no-untyped-call]
            end.synchronize()  # type: ignore[no-untyped-call]
            seconds.append(start.elapsed_time(end) / 4e3)  # type: ignore[no-untyped-call]
    return 2 * n * n / seconds[0], 2 * n**3 / seconds[1]


def weights(layers: list[nn.Module]) -> int:
    """Numbers in these layers' linear maps."""
    return sum(prod(features(m)) for layer in layers for _, m in modules(layer) if is_linear(m))


def activation_bytes(layers: list[nn.Module], tokens: int) -> int:
    """What these layers keep for the backward pass, about: inputs and outputs of every linear map at 2 bytes (37 GB for an
    8-billion Llama at 8192 tokens, and that is what was measured)."""
    width = sum(sum(features(m)) for layer in layers for _, m in modules(layer) if is_linear(m))
    return int(2 * 0.85 * width * tokens)
