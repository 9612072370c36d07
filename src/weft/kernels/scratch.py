"""One buffer to decode weights into, used again and again: a fresh one costs page faults on a CPU and fragments a card's memory."""

from __future__ import annotations

import threading
from math import prod
from weakref import WeakSet

import torch
from torch import Tensor


class Buffers(dict[object, Tensor]):
    """Those of one thread: the backward pass on a card runs in a thread of its own, and a server has several."""

    __hash__ = object.__hash__  # type: ignore[assignment]


_here = threading.local()
_all: WeakSet[Buffers] = WeakSet()


def real(tensor: Tensor) -> bool:
    """Whether this is a tensor with bytes behind it: nothing is being compiled, and it is neither fake nor on the meta device."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def scratch(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A tensor of this shape on `like`'s device, valid until the next call from the same thread on the same stream.

    None where a buffer must not be shared: while compiling, under fake tensors, and in the capture of a CUDA graph.
    """
    if not real(like):
        return None
    device, stream = like.device, 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(device).cuda_stream
    buffers: Buffers | None = getattr(_here, "buffers", None)
    if buffers is None:
        buffers = _here.buffers = Buffers()
        _all.add(buffers)
    key, numel = (device, stream, dtype), prod(shape)
    found = buffers.get(key)
    if found is None or found.numel() < numel:
        buffers.pop(key, None)
        found = None  # the smaller one goes before the larger one comes
        with torch.inference_mode(False):  # it must be fit for writing in any mode afterwards
            found = buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return found[:numel].view(shape)


def release() -> None:
    """Give the buffers of all threads back: when a model is dropped, or when layers are compiled, which have no use for them."""
    for buffers in list(_all):
        buffers.clear()
