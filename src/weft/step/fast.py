"""The fast path of a training step, chosen here and nowhere else.

    compiled layers         each repeated layer is one graph (CUDA)
    no logits               the head and the loss are one operation, a slice of tokens at a time
    a budget of memory      what is kept for the backward pass and what is made again, by what the card has free
    checked                 before the first step, against the plain path; what does not agree is not used, and that is said

Packed rows (`weft.models.attention`) and the flat buffer of the adapter (`weft.train.flat`) are there on either path.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import WeftError, features, is_linear, modules
from weft.quant import is_quantised
from weft.step.check import bounds, differences, measure, stirred
from weft.step.loss import Batch, fusible, loss_sum
from weft.step.regions import install, repeated, uninstall

logger = logging.getLogger("weft")
Memory = float | int | str  # "auto", a share (0 to 1), or bytes
LEVELS = (1.0, 0.7, 0.4, 0.1, 0.0)  # share of the activations kept; below RECOMPUTE: each layer's input alone; 0: in the host's memory
RECOMPUTE = 0.2
SPARE = 0.88  # of what is free may be planned for: the allocator cuts memory into pieces, and kernels want workspaces


@dataclass
class Fast:
    """What was chosen. `loss(batch)` is the step's forward; `close()` gives the model its own calls back."""

    model: nn.Module
    compiled: bool
    head: nn.Linear | None
    varying: bool
    level: float
    layers: list[nn.Module]
    cuda: bool
    said: list[str] = field(default_factory=list)
    compile_seconds: float = 0.0

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of a micro-batch, () fp32."""
        return loss_sum(self.model, batch, self.head)

    def install(self, level: float) -> None:
        """Regions for this level of memory."""
        self.level = level
        recompute = len(self.layers) if level < RECOMPUTE else 0
        if not self.compiled and RECOMPUTE <= level < 1:  # without a compiler to choose what is cheap, whole layers are kept or not
            recompute = round((1 - level) * len(self.layers))
        uninstall(self.layers)
        if self.compiled or recompute:
            offload = level == 0 and self.cuda
            install(self.layers, self.compiled, self.varying, recompute, offload, level if level >= RECOMPUTE else 1.0)

    def close(self) -> None:
        uninstall(self.layers)

    def describe(self) -> str:
        parts = [f"{len(self.layers)} layers compiled" if self.compiled else "layers as they are"]
        parts.append("no logits formed" if self.head is not None else "all logits formed")
        if self.level >= 1:
            parts.append("activations kept")
        elif self.level >= RECOMPUTE:
            parts.append(f"{self.level:.0%} of the activations kept")
        else:
            parts.append("layers recomputed" + (", their inputs in host memory" if self.level == 0 and self.cuda else ""))
        return "step: " + ", ".join(parts)


def prepare(
    model: nn.Module, batch: Batch, parameters: Mapping[str, nn.Parameter], *, memory: Memory = "auto", compile: bool | None = None,
    varying: bool = True, self_check: bool = True, say: Callable[[str], None] = logger.warning,
) -> Fast:  # fmt: skip
    """Choose the fast path for this model and try it on a micro-batch.

    Args:
        batch: the largest micro-batch of the run, on the model's device.
        parameters: what is trained; gradients, if any, are zero afterwards.
        memory: "auto" spends what the card has free; a share of the activations to keep, from 0 (least memory) to 1 (most speed); or
            bytes that the whole process may take on the card (above 1).
        compile: None: on CUDA. varying: batches differ in shape.
        self_check: compare with the plain path. say: where a fall-back is told.
    Raises:
        WeftError: the micro-batch does not fit even with the least memory; a memory setting of no sense.
    """
    if (isinstance(memory, str) and memory != "auto") or (not isinstance(memory, str) and memory < 0):
        raise WeftError(f'train.memory: {memory!r} is not "auto", a share from 0 to 1, nor a number of bytes')
    device = batch.input_ids.device
    cuda = device.type == "cuda"
    fast = Fast(model, cuda if compile is None else compile, fusible(model), varying, 1.0, repeated(model), cuda)
    # The first form of the packed product gave wrong gradients when compiled on a card (found by the self-check). It has another form
    # since, which agrees on a CPU; until it is measured on a card, packed bases run as they are there.
    packed = cuda and compile is None and any(is_quantised(m) for _, m in modules(model))
    fast.compiled = fast.compiled and bool(fast.layers) and not packed
    fast.install(_level(model, batch, memory, fast.layers))
    if not fast.compiled and fast.head is None:
        return fast
    random = _active_dropout(model)
    training = model.training
    if random:  # two passes would draw different masks
        model.eval()
    try:
        _try(fast, batch, parameters, self_check, say)
    finally:
        model.train(training)
    return fast


def _try(fast: Fast, batch: Batch, parameters: Mapping[str, nn.Parameter], self_check: bool, say: Callable[[str], None]) -> None:
    started = time.perf_counter()
    device = batch.input_ids.device
    with stirred(parameters, device):
        while True:
            out_of_memory = False
            try:
                found = measure(lambda: fast.loss(batch), parameters)
                break
            except torch.OutOfMemoryError:
                out_of_memory = True
            except Exception as e:  # a compiler's failure has many types; the plain path is right, only slower
                if not fast.compiled:
                    raise
                say(f"the layers could not be compiled and run as they are ({type(e).__name__}: {str(e).strip().splitlines()[0][:300]})")
                fast.compiled = False
                fast.install(fast.level)
            if out_of_memory:
                _clear(parameters)
                lower = [level for level in LEVELS if level < fast.level]
                if not lower:
                    raise WeftError("a micro-batch does not fit into the memory, whatever is recomputed: lower train.tokens")
                say(f"out of memory with {fast.level:.0%} of the activations kept; trying less")
                fast.install(lower[0])
        fast.compile_seconds = time.perf_counter() - started
        if self_check:
            _compare(fast, found, batch, parameters, say)


def _compare(fast: Fast, found: Any, batch: Batch, parameters: Mapping[str, nn.Parameter], say: Callable[[str], None]) -> None:
    """The same micro-batch with nothing compiled and by the operations' references, recomputed piece by piece so that it fits."""
    kind, limits = bounds(fast.model)
    chosen = [layer._compiled_call_impl for layer in fast.layers]
    uninstall(fast.layers)
    plain = None
    try:
        if fast.layers and batch.input_ids.device.type == "cuda":
            install(fast.layers, False, fast.varying, len(fast.layers), False, fast.level)
        plain = measure(lambda: loss_sum(fast.model, batch, fast.head, plain=True), parameters)
    except torch.OutOfMemoryError:
        _clear(parameters)
        say("the self-check was left out: the plain path does not fit into the memory")
    for layer, call in zip(fast.layers, chosen, strict=True):
        layer._compiled_call_impl = call
    if plain is None:
        return
    agreed, wrong = differences(found, plain, limits)
    if wrong:
        listed = "\n  ".join(wrong[:8] + ([f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []))
        say(f"the fast step does not agree with the plain one, which is used instead:\n  {listed}")
        fast.compiled, fast.head = False, None
        fast.install(fast.level)
    else:
        fast.said.append(f"self-check ({kind}): {agreed}")


def _clear(parameters: Mapping[str, nn.Parameter]) -> None:
    for p in parameters.values():
        if p.grad is not None:
            p.grad.zero_()
    torch.cuda.empty_cache()


def _active_dropout(model: nn.Module) -> bool:
    """Whether two passes of the model in training mode would differ."""
    for module in model.modules():
        rates = [getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout")]
        if any(isinstance(r, float) and r > 0 for r in rates):
            return True
    return False


def _level(model: nn.Module, batch: Batch, memory: Memory, layers: list[nn.Module]) -> float:
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
    return next((level for level in LEVELS if level <= share), 0.0)


def activation_bytes(layers: list[nn.Module], tokens: int) -> int:
    """What these layers keep for the backward pass, about: inputs and outputs of every linear map at 2 bytes (measured: 37 GB for an
    8-billion Llama at 8192 tokens, where this says 40)."""
    width = sum(sum(features(m)) for layer in layers for _, m in modules(layer) if is_linear(m))
    return int(2 * 0.85 * width * tokens)
