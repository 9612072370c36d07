"""Levels of memory: what is kept for the backward pass, and what is made again or waits in the host's memory."""

from __future__ import annotations

import torch
from torch import nn

from weft.core import features, is_linear, modules
from weft.step.loss import Batch

Memory = float | int | str  # "auto", a share (0 to 1), or bytes
LEVELS = (1.0, 0.5, 0.3, 0.1, 0.0)  # share of the activations kept; below RECOMPUTE: little but each layer's input; 0: nothing on the card
RECOMPUTE = 0.2
MOST = 0.99  # of the compiler's budget: below 1 it makes again what no matrix product is needed for, for 0.4% of an 8B step's time,
LEAN = 0.67  # and then keeps this share (25 GB of 37)
THIN = 0.01  # what a layer keeps that is made again: its input, and the thin products of its adapters (weft.step.budget)
AWAY = 0.2  # level 0 keeps this share in the host's memory: what PCIe 5 moves while a layer of an 8-billion Llama works
SPARE = 0.88  # of what is free may be planned for: the allocator cuts memory into pieces, and kernels want workspaces


def kept(level: float, offload: bool) -> float:
    """The share of its activations that a compiled layer keeps."""
    return AWAY if offload else THIN if level < RECOMPUTE else min(level, MOST)


def fitting(batch: Batch, memory: Memory, layers: list[nn.Module], compiled: bool) -> float:
    """The share of activations to keep. On a CPU "auto" keeps all."""
    device = batch.input_ids.device
    if not isinstance(memory, str) and memory <= 1:
        return float(memory)
    if device.type != "cuda":
        return 1.0
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not isinstance(memory, str):
        free = min(free, int(memory) - torch.cuda.memory_allocated(device))
    need = activation_bytes(layers, batch.input_ids.numel())
    fixed = 3 * need / max(len(layers), 1) + 2**30  # a layer's own temporaries and the loss's slice, in either case
    share = (SPARE * free - fixed) / max(need, 1)
    return next((level for level in LEVELS if min(level, LEAN if compiled else 1.0) <= share), 0.0)


def activation_bytes(layers: list[nn.Module], tokens: int) -> int:
    """What these layers keep for the backward pass, about: inputs and outputs of every linear map at 2 bytes (measured: 37 GB for an
    8-billion Llama at 8192 tokens, where this says 40)."""
    width = sum(sum(features(m)) for layer in layers for _, m in modules(layer) if is_linear(m))
    return int(2 * 0.85 * width * tokens)
