"""The fast path of a training step, chosen here and nowhere else.

    compiled layers         each repeated layer is one graph (CUDA)
    CUDA graphs             the host launches all layers at once, each way
    gated MLPs              what lies between their products is one operation each way, where all three have LoRA or DoRA
    stacked layers          q, k and v are one product each way, and so are gate and up
    lone layers             o, say, and its adapter are one operation; the norm behind the layers is one kernel
    no logits               the head and the loss are one operation, a slice of tokens at a time
    a shorter last layer    what follows attention there works on tokens that bear loss alone, where layers are not compiled
    no mask                 padded rows go without one where a token never looks right, which is where padding is
    a budget of memory      what is kept for the backward pass, on the card or the host, and what is made again, by what the card has free
    checked                 before the first step, against the plain path; what does not agree is not used, and that is said

Packed rows (`weft.models.attention`) and the flat buffer of the adapter (`weft.train.flat`) are there on either path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import Thread

from torch import Tensor, nn

from weft.core import amount
from weft.kernels.launch import usable
from weft.quant import QuantLinear
from weft.step import elide, trial
from weft.step.capture import able
from weft.step.check import active_dropout, as_stored, bounds, recomputes, stored
from weft.step.fp8 import narrowable
from weft.step.graph import Chain, brief
from weft.step.inside import Inside
from weft.step.levels import RECOMPUTE, Memory, fitting, kept, lent, told
from weft.step.loss import Batch, fusible, loss_sum, loss_sums, unmaskable
from weft.step.placed import STEP, close_earlier, ended, put, take
from weft.step.regions import install, lenders, repeated, uninstall
from weft.step.routing import each, routed
from weft.step.warming import card, warm

logger = logging.getLogger("weft")


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
    unmasked: bool = False  # padded rows go without their attention mask
    narrow: dict[str, QuantLinear] = field(default_factory=dict)  # the layers that multiply in fp8, by path
    inside: Inside = field(default_factory=Inside)  # what stands in for forwards inside of compiled layers
    tail: list[nn.Module] = field(default_factory=list)  # of the last layer: they work on tokens that bear loss alone
    graphs: bool = False  # compiled layers run as CUDA graphs, where that can be; gradients are then those of `backward()` alone
    insist: bool = False  # also where these leave little memory
    most: int = 0  # bytes that may be taken, if that was asked for
    lends: bool = True  # layers may lend: the host has room for it
    lending: int = 0  # layers that keep what they keep in the host's memory
    chain: Chain | None = None
    ahead: Thread | None = None  # compiles kernels while the plain pass works
    said: list[str] = field(default_factory=list)
    compile_seconds: float = 0.0

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of a micro-batch, () fp32."""
        with as_stored(self.model, batch), self.inside.working(), elide.only(self.tail, batch):
            return loss_sum(self.model, batch, self.head, unmasked=self.unmasked)

    def losses(self, batch: Batch, counts: Sequence[int]) -> list[Tensor]:
        """The same for each owner of a batch, as `loss_sums` counts them. Call it, and the backward pass, within `routed(batch)`."""
        with as_stored(self.model, batch), self.inside.working():
            return loss_sums(self.model, batch, counts, self.head, unmasked=self.unmasked)

    def routed(self, batch: Batch) -> AbstractContextManager[None]:
        """Within it every row of this batch goes through its owner's adapter."""
        return routed(self.model, batch)

    def away(self, level: float) -> float:
        """The share of the layers that lend what they keep."""
        share = lent(level) if self.cuda and self.lends and (self.compiled or level == 0) else 0.0
        return share if lenders(self.layers, share) else 0.0

    def install(self, level: float, ahead: bool = False) -> None:
        """Regions for this level of memory. ahead: a layer was compiled for it, and is not once more."""
        self.level = level
        away = self.away(level)
        share, recompute = kept(level, away), 0
        if not self.compiled:  # without a compiler to choose what is cheap, whole layers are kept or not
            share, recompute = 1.0, len(self.layers) if level < RECOMPUTE else round((1 - level) * len(self.layers))
        self.lending = 0
        self.close()
        put(self.model, **{STEP: self})
        for layer in self.narrow.values():
            put(layer, narrow=True)
        if self.compiled:
            self.inside.install()
        if self.graphs and self.compiled and not away:
            self.chain = Chain(self.insist)
        if self.compiled or recompute:
            self.tail = []  # a graph more, or computed again when the batch is another
            self.lending = install(self.layers, self.compiled, self.varying, recompute, away, share, self.chain, ahead)

    @property
    def captured(self) -> bool:
        """Whether layers do run as CUDA graphs."""
        return self.chain is not None and bool(self.chain.graphs)

    def close(self) -> None:
        if not ended(self.model, self):
            return
        uninstall(self.layers)
        if self.chain is not None:
            self.chain.close()
            self.chain = None
        self.inside.uninstall()
        for layer in narrowable(self.model, everywhere=True).values():
            take(layer, "narrow")

    def less(self) -> str:
        """Take the most daring of what is inside of the layers out of them; says what, or nothing."""
        self.close()
        return self.inside.give_up()

    def describe(self) -> str:
        parts = [f"{len(self.layers)} layers compiled" if self.compiled else "layers as they are"]
        if self.captured:
            parts[0] += ", as CUDA graphs"
        if self.compiled:
            parts += self.inside.describe()
        if self.narrow:
            parts.append(f"{len(self.narrow)} products in fp8")
        if self.tail:
            parts.append("the last layer's MLP at tokens that bear loss")
        parts.append("no logits formed" if self.head is not None else "all logits formed")
        if self.unmasked:
            parts.append("padding not masked")
        return "step: " + ", ".join([*parts, told(self.level, self.lending)])


@stored
def prepare(
    model: nn.Module, batch: Batch, parameters: Mapping[str, nn.Parameter], *, memory: Memory = "auto", compile: bool | None = None,
    fp8: bool | None = None, graphs: bool | None = None, varying: bool = True, self_check: bool = True,
    say: Callable[[str], None] = logger.warning,
) -> Fast:  # fmt: skip
    """Choose the fast path for this model and try it on a micro-batch.

    Args:
        batch: the largest micro-batch of the run, on the model's device.
        parameters: what is trained; gradients, if any, are zero afterwards.
        memory: "auto" spends what the card has free; a share of the activations to keep there, from 0 (least memory) to 1 (most speed); or
            bytes (above 1, or "40GB") that the whole process may take on the card, which is measured.
        compile: None: on CUDA. varying: batches differ in shape.
        fp8: multiply in fp8 in the layers that an fp8 base stores so, where the device has such units; None: with the self-check, which
            holds each of those products against the plain one.
        graphs: run compiled layers as CUDA graphs, one for each direction; None: where the host is what small layers wait for; True: also
            where it is not, and where their memory, which stays reserved between steps, leaves little of the card or of the bytes in
            `memory`. Gradients then come by `backward()`.
        self_check: compare with the plain path. say: where a fall-back is told.
    Raises:
        WeftError: the micro-batch does not fit even with the least memory; a memory setting of no sense; autocast on an fp32 base.
    """
    share = amount(memory, "train.memory")  # as all that is said here speaks of the recipe
    close_earlier(model)
    device, layers = batch.input_ids.device, repeated(model)
    cuda = device.type == "cuda"
    compiled = (cuda if compile is None else compile) and bool(layers)
    if compiled:
        warm(device)
    heads = [fusible(model) for _ in each(model, batch)]
    head = heads[0] if all(h is heads[0] for h in heads) else None
    level = fitting(batch, share, layers, compiled)
    narrow = narrowable(model) if (self_check if fp8 is None else fp8) else {}
    if fp8 and not narrow:
        say("no product can be in fp8 here (that takes base: fp8, and a card with fp8 units): they are computed from decoded weights")
    with routed(model, batch):
        fast = Fast(model, compiled, head, varying, level, layers, cuda, unmaskable(model, batch, head), narrow)
        fast.most = int(share) if cuda and share is not None and share > 1 else 0
        if compiled:
            fast.inside = Inside.of(model, layers, narrow.values(), usable(batch.input_ids))
        elif elide.masked(batch):  # else the self-check would not hold it against the plain step
            fast.tail = elide.tail(model, layers, head, parameters)
    if not (fast.compiled or fast.head is not None or fast.unmasked or fast.narrow or fast.tail):
        fast.install(fast.level)
        return fast
    random = active_dropout(model)
    training = model.training
    if random:  # two passes would draw different masks
        model.eval()
    if graphs is not False and compiled:
        why = _one_by_one(model, batch, random)
        may = (share is None or share <= 1) and brief(layers, batch.input_ids.numel(), bool(narrow))
        fast.graphs, fast.insist = not why and (bool(graphs) or may), bool(graphs)
        if graphs and why:
            say(f"the layers do not run as CUDA graphs: {why}")
    if compiled and cuda:
        card(device).join()
    try:
        trial.run(fast, batch, parameters, self_check, bool(fp8), say)
    except BaseException:
        fast.close()
        raise
    finally:
        model.train(training)
        if fast.ahead is not None:
            fast.ahead.join()
    return fast


def _one_by_one(model: nn.Module, batch: Batch, random: bool) -> str:
    """Why the layers cannot be launched at once, or nothing. What only a pass can tell, `Chain` finds out."""
    if not able(batch.input_ids.device):
        return "that takes a CUDA device"
    if random:
        return "there is dropout, whose masks differ from pass to pass"
    if batch.owners and batch.cu_seqlens is None:
        return "several adapters train on padded rows, and whose are where changes from batch to batch"
    if batch.cu_seqlens is not None and batch.cu_seqlens.is_cuda and bounds(model, False)[0] == "fp32":
        return "attention over packed rows goes by their lengths on the host in fp32"
    if getattr(model, "plan", None) is not None:  # a prefix's keys, where an ALoRA begins
        return "an adapter of the whole model hands its layers more than they are called with"
    if trial.several():
        return "several processes train, which may exchange gradients in the middle of a backward pass"
    if recomputes(model):
        return "the model recomputes its layers by itself (gradient checkpointing)"
    return ""
