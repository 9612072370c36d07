"""What a first step would wait for and a thread can begin while the model is read: the compiler, its workers, and the card's libraries."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from threading import Thread

import torch
from torch.nn import functional as F

logger = logging.getLogger("weft")


def warm(device: torch.device | None = None) -> Thread:
    """Begin in the background to import the compiler and to start its workers, and to load the libraries of the card that trains.

    device: where training will be; None, or one that is no card: no card is touched.
    Join what is returned before compiling: two threads that import parts of one package can each meet the other's half.
    """
    if device is not None and device.type == "cuda" and torch.cuda.is_available():
        card(device)
    return compiler()


@cache
def compiler() -> Thread:
    def begin() -> None:
        try:
            # The workers first: they import torch and Triton in a process of their own, which takes longer than what is imported here, and
            # until they are there kernels are compiled one after another in this process (1.7 s of an 8-billion Llama's first step).
            from torch._inductor.async_compile import AsyncCompile

            AsyncCompile.warm_pool()
            AsyncCompile.wakeup()
            import_module("torch._inductor.compile_fx")
            from torch._inductor.runtime.triton_compat import HAS_TRITON, triton_key

            if HAS_TRITON:
                triton_key()  # reads all of Triton: it is part of the caches' keys
        except Exception:  # such as a process that ends meanwhile; whoever compiles imports it again, and meets what is wrong
            logger.debug("the compiler was not warmed up", exc_info=True)

    thread = Thread(target=begin, name="weft-warms-the-compiler", daemon=True)
    thread.start()
    return thread


_card: list[Thread] = []  # one: libraries are loaded once for all cards of a process


def card(device: torch.device) -> Thread:
    """Begin to load what a card's first product and first attention wait for: most of the 2.7 s that the latter takes an H100.

    Join it before CUDA graphs are captured, in which no other thread may allocate.
    """

    def begin() -> None:
        try:
            with torch.cuda.device(device), torch.autograd.set_multithreading_enabled(False):
                q, k, v = (torch.zeros(1, n, 256, 128, dtype=torch.bfloat16, device=device, requires_grad=True) for n in (8, 2, 2))
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                torch.autograd.grad(y, (q, k, v), torch.zeros_like(y))
                F.linear(y[0, 0].detach(), k[0, 0].detach())
        except Exception:  # such as an old card, or a full one; whoever comes next meets what is wrong
            logger.debug("the card's libraries were not loaded ahead", exc_info=True)

    if not _card:
        # No daemon: a process that ends waits for it, for to be cut off within a library's loading is not always survived.
        _card.append(Thread(target=begin, name="weft-wakes-the-card"))
        _card[0].start()
    return _card[0]
