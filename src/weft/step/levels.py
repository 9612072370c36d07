"""Levels of memory: what is kept for the backward pass, and what is made again or waits in the host's memory."""

from __future__ import annotations

import re

import torch
from torch import nn

from weft.core import WeftError, features, is_linear, modules
from weft.step.loss import Batch

Memory = float | int | str  # "auto", a share (0 to 1), or bytes, also as "40GB"
UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEVELS = (1.0, 0.75, 0.5, 0.3, 0.1, 0.0)  # share of the activations kept on the card; below RECOMPUTE: little but each layer's input
LENDS = 0.7  # from here on what is not kept on the card waits in the host's memory, and nothing more is made again
RECOMPUTE = 0.2
MOST = 0.99  # of the compiler's budget: below 1 it makes again what no matrix product is needed for, for 0.4% of an 8B step's time,
LEAN = 0.63  # and then keeps this share (25 GB of 40, by the count below)
THIN = 0.01  # what a layer keeps that is made again: its input, and the thin products of its adapters (weft.step.budget)
AWAY = 0.2  # level 0 keeps this share in the host's memory: what PCIe 5 moves while a layer of an 8-billion Llama works
SPARE = 0.9  # of what is free may be planned for: the allocator cuts memory into pieces, and kernels want workspaces


def amount(memory: Memory) -> float | None:
    """A share from 0 to 1 or, above 1, bytes; None for "auto".

    Raises:
        WeftError: it is none of these.
    """
    if memory == "auto":
        return None
    told = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]I?B)?\s*", str(memory).upper()) if isinstance(memory, str) else None
    value = float(told[1]) * UNITS[told[2] or ""] if told else memory
    if isinstance(value, str) or not 0 <= value < float("inf"):
        raise WeftError(f'train.memory: {memory!r} is not "auto", a share from 0 to 1, nor a number of bytes such as "40GB"')
    return float(value)


def lent(level: float) -> float:
    """The share of compiled layers on a card that keep what they keep in the host's memory."""
    return 1.0 if level == 0 else 1 - level if level >= LENDS else 0.0


def kept(level: float, lent: float) -> float:
    """The share of its activations that a compiled layer keeps."""
    if level < RECOMPUTE:
        return AWAY if lent else THIN
    return MOST if lent else min(level, MOST)


def fitting(batch: Batch, memory: float | None, layers: list[nn.Module], compiled: bool) -> float:
    """The share of activations to keep, of what `amount` says. On a CPU "auto" keeps all."""
    device = batch.input_ids.device
    if memory is not None and memory <= 1:
        return memory
    if device.type != "cuda":
        return 1.0
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if memory is not None:
        free = min(free, int(memory) - torch.cuda.memory_allocated(device))
    need = activation_bytes(layers, batch.input_ids.numel())
    fixed = 2 * need / max(len(layers), 1) + 2**30  # a layer's own temporaries and the loss's slice, in either case
    share = (SPARE * free - fixed) / max(need, 1)
    if not compiled:
        return next((level for level in LEVELS if level <= share), 0.0)
    return next((level for level in LEVELS if (LEAN * level if level >= LENDS else min(level, LEAN)) <= share), 0.0)


def activation_bytes(layers: list[nn.Module], tokens: int) -> int:
    """What these layers keep for the backward pass, about: inputs and outputs of every linear map at 2 bytes (measured: 37 GB for an
    8-billion Llama at 8192 tokens, where this says 40)."""
    width = sum(sum(features(m)) for layer in layers for _, m in modules(layer) if is_linear(m))
    return int(2 * 0.85 * width * tokens)
