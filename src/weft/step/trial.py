"""Trying a step before it is used: a micro-batch goes through the plain path and through the fast one, and what fails, does not fit into
the memory or disagrees is left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.core import WeftError
from weft.kernels.scratch import release
from weft.step import early, twin
from weft.step.capture import recent_peak, remember
from weft.step.check import bounds, differences, measure, pieces, stirred
from weft.step.fp8 import BOUND, watched
from weft.step.levels import LEVELS, kept
from weft.step.loss import Batch, loss_sum
from weft.step.offload import HostFull
from weft.step.regions import install, settle, uninstall

if TYPE_CHECKING:
    from weft.step.fast import Fast

CHECKED = 2048  # tokens of a piece of the self-check's plain pass, which forms more at once than the fast one
PASSES = 2  # of the checked micro-batch after the one that compiles: its layers are captured and replayed, and replayed once more


def run(
    fast: Fast, batch: Batch, parameters: Mapping[str, nn.Parameter], self_check: bool, unchecked: bool, say: Callable[[str], None]
) -> None:
    """Run the micro-batch both ways. What fails, does not fit or disagrees is left out: CUDA graphs, stacking, fused MLPs, compiling, all.

    unchecked: products in fp8 stay, though the plain path did not fit and nothing was held against it.
    """
    started = time.perf_counter()
    with stirred(parameters, batch.input_ids.device):
        if fast.compiled and fast.cuda:  # only now: a backward pass fails when its parameters were written to since the forward one
            fast.ahead = early.launch(fast.inside.mlps, fast.head, batch.input_ids)
        ahead = compile_ahead(fast, batch, parameters) if self_check else None
        try:
            work = partial(plain_pass, fast, batch, parameters, say)
            plain = twin.beside(ahead, work, partial(clear, parameters)) if self_check else None
        finally:
            made = ahead is not None and ahead.end()
        if self_check and plain is None and not unchecked:
            fast.narrow = {}
        while True:
            try:
                fast.install(fast.level, made)
                found, failed = fast_pass(fast, batch, parameters, say)
            except torch.OutOfMemoryError:  # weights that come to lie in one tensor are there twice meanwhile
                found, failed = None, "does not fit into the memory"
            made = False
            if plain is not None and found is not None:
                kind, limits = bounds(fast.model, bool(fast.narrow))
                agreed, wrong = differences(found, plain, limits)
                if wrong:
                    failed = "does not agree with the plain one:\n  " + "\n  ".join(wrong[:8])
                    failed += f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
                else:
                    fast.said.append(f"self-check ({kind}): {agreed}")
            if not failed:
                break
            if fast.chain is not None and fast.chain.known and not fast.chain.why:
                say(f"the layers do not run as CUDA graphs: the step with them {failed}")
                fast.graphs = False
            elif fast.compiled and (less := fast.less()):
                say(f"{less}: the step with them so {failed}")
            elif fast.compiled:
                say(f"the layers are not compiled: the step with compiled ones {failed}")
                fast.compiled = False
            elif fast.tail:
                say(f"the last layer computes all tokens: the step with those that bear loss alone {failed}")
                fast.tail = []
            else:
                say(f"the plain step is used: the fast step {failed}")
                fast.compiled, fast.head, fast.unmasked, fast.narrow = False, None, False, {}
                fast.install(fast.level)
                break
    fast.compile_seconds = time.perf_counter() - started


def compile_ahead(fast: Fast, batch: Batch, parameters: Mapping[str, nn.Parameter]) -> twin.Ahead | None:
    """Begin to compile the layers while the plain pass works. Not in fp8: which layers are in it is what that pass tells. And not where
    processes exchange what their layers need: a copy's call, and a forward pass that ends at the first layer, are no part of that."""
    if not fast.compiled or not fast.cuda or fast.narrow or several():
        return None
    settle(kept(fast.level, fast.away(fast.level)))
    torch._dynamo.reset()
    with fast.routed(batch):
        thread = twin.begin(fast.model, fast.layers, fast.inside, parameters.values(), fast.varying, lambda: fast.loss(batch))
    if thread is not None:
        thread.start()
    return thread


def fast_pass(
    fast: Fast, batch: Batch, parameters: Mapping[str, nn.Parameter], say: Callable[[str], None]
) -> tuple[tuple[float, dict[str, Tensor]] | None, str]:
    """(loss and gradients of the micro-batch at the highest level of memory that fits, why there are none)."""
    moments = 8 * sum(p.numel() for p in parameters.values())  # AdamW's, which come with the first step
    while True:
        try:
            if fast.most:
                remember(batch.input_ids.device)
                torch.cuda.reset_peak_memory_stats(batch.input_ids.device)
            found = measure(fast.model, [batch], fast.loss, parameters)
            for _ in range(PASSES):
                if fast.chain is not None and not fast.chain.why:  # what counts is what the graphs give
                    if fast.ahead is not None:
                        fast.ahead.join()  # its nodes that add gradients would be in the way of a capture
                    found = measure(fast.model, [batch], fast.loss, parameters)
            taken = recent_peak(batch.input_ids.device) + moments if fast.most else 0
            if taken <= fast.most:
                return found, ""
            why = f"{taken / 1e9:.1f} GB taken"
            if not fast.level:
                say(f"the step takes {taken / 1e9:.1f} GB, more than train.memory, whatever is recomputed: lower train.tokens")
                return found, ""
        except torch.OutOfMemoryError as e:  # what it holds goes with the exception, before the next try
            why, fast.lends = str(e).split(". ")[0], fast.lends and not isinstance(e, HostFull)
        except Exception as e:  # a compiler's failure has many types; the plain path is right, only slower
            if not fast.compiled and not fast.tail:
                raise
            clear(parameters)
            return None, f"could not be compiled or run ({type(e).__name__}: {str(e).strip().splitlines()[0][:300]})"
        clear(parameters)
        full = bool(fast.lending) and not fast.lends  # the host, not the card: the same without it
        lower = [fast.level] if full else [level for level in LEVELS if level < fast.level]
        if not lower:
            raise WeftError("a micro-batch does not fit into the memory, whatever is recomputed: lower train.tokens")
        say(f"{why} with {fast.level:.0%} of the activations kept; trying {'without lending' if full else 'less'}")
        fast.install(lower[0])


def plain_pass(
    fast: Fast, batch: Batch, parameters: Mapping[str, nn.Parameter], say: Callable[[str], None], keep: bool = True
) -> tuple[float, dict[str, Tensor]] | None:
    """The micro-batch with nothing compiled and by the operations' references, in pieces, and layer by layer so that it fits.

    keep: not layer by layer where a piece needs no more than the step.

    Meanwhile each product that would be in fp8 is held against the plain one; those that are too far off lose it.
    """
    keeps = keep and fast.level >= 1 and batch.input_ids.numel() >= 4 * CHECKED  # a piece takes less than the step will, then
    if fast.layers and fast.cuda:
        install(fast.layers, False, fast.varying, 0 if keeps else len(fast.layers), 0.0, 1.0)
    found = None
    try:
        with watched(list(fast.narrow.values())) as apart:
            plainly = partial(loss_sum, fast.model, head=fast.head, plain=True)
            found = measure(fast.model, pieces(batch, CHECKED), plainly, parameters)
    except torch.OutOfMemoryError:
        clear(parameters)
    finally:
        uninstall(fast.layers, settings=False)  # which a layer may be being compiled with
        release()
    if found is None and keeps:
        return plain_pass(fast, batch, parameters, say, keep=False)
    if found is None:
        say("the self-check was left out: the plain path does not fit into the memory")
        return None
    fast.narrow = {path: m for path, m in fast.narrow.items() if id(m) in apart}  # what this batch never reached is not known to be right
    far = {path: apart[id(m)] for path, m in fast.narrow.items() if not apart[id(m)] <= BOUND}
    if far:
        shown = ", ".join(f"{path} ({error:.2g})" for path, error in list(far.items())[:8])
        say(f"{len(far)} of {len(fast.narrow)} layers are too far off in fp8 (more than {BOUND} of a product) and decode: {shown}")
        fast.narrow = {path: m for path, m in fast.narrow.items() if path not in far}
    if fast.narrow:
        worst = max(apart[id(m)] for m in fast.narrow.values())
        fast.said.append(f"fp8: each product within {worst:.2g} of the plain one (bound {BOUND})")
    return found


def clear(parameters: Mapping[str, nn.Parameter]) -> None:
    for p in parameters.values():
        if p.grad is not None:
            p.grad.zero_()
    torch.cuda.empty_cache()


def several() -> bool:
    """Whether several processes train."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
