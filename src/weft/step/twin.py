"""A layer is compiled ahead, from a copy of it, while the self-check's plain pass keeps the card busy.

All layers of a kind share one graph, so one of them can be compiled for all. The plain pass wants layers as they are and the compiler wants
them fused and stacked, so the compiler has a copy: modules of its own around the same numbers. What it makes of the copy is not run, so
that nothing is tuned against a busy card: the first layer that is called finds it, runs it, and tunes it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from contextvars import copy_context
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weft.methods.kept import Kept
from weft.step.inside import Inside
from weft.step.regions import Region, Unrun, lowest, unrun

logger = logging.getLogger("weft")
T = TypeVar("T")


class _Given(Exception):
    """What a layer is given, thrown so that no more of the model runs."""


def begin(
    model: nn.Module, layers: list[nn.Module], inside: Inside, parameters: Iterable[nn.Parameter], varying: bool, loss: Callable[[], Any]
) -> Ahead | None:
    """Compile the first layer that is trained, both ways, in a thread, with torch's settings as they are; None where that cannot be tried.

    parameters: what is trained. varying: as for `Region`. loss: the forward pass that the layer is to be compiled for.
    """
    try:
        layer = lowest(layers)
        args, kwargs = _given(layer, loss)
        twin = _copy(model, layer, parameters)
        twins = dict(zip(layer.modules(), twin.modules(), strict=True))
        return Ahead(Region(twin, True, varying, False), args, kwargs, inside.copied(twins))
    except Exception:  # not every module can be copied; what is wrong with the model itself the plain pass meets next
        logger.debug("no layer is compiled ahead", exc_info=True)
        return None


class Ahead(Thread):
    """The thread."""

    def __init__(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any], inside: Inside) -> None:
        super().__init__(name="weft-compiles-a-layer", daemon=True)
        self.region, self.args, self.kwargs, self.inside = region, args, kwargs, inside
        self.done = False
        self.context = copy_context()  # torch keeps settings there from 2.12 on
        inside.install()

    def run(self) -> None:
        self.context.run(self._compile)

    def _compile(self) -> None:
        try:
            here = torch.cuda.device_of(self.args[0])  # type: ignore[no-untyped-call]
            with here, self.inside.working(), unrun():
                self.region.now(*self.args, **self.kwargs)
        except Unrun:
            self.done = True
        except Exception:  # whoever compiles next meets what is wrong, and says it
            logger.debug("a layer was not compiled ahead", exc_info=True)

    def end(self) -> bool:
        """Wait for it. Whether there is a graph."""
        self.join()
        for stack in self.inside.stacks.values():
            stack.drop()
        del self.region, self.args, self.kwargs, self.inside
        return self.done


def beside(ahead: Ahead | None, work: Callable[[], T], clear: Callable[[], None]) -> T:
    """What `work` gives while a layer is compiled; where it breaks off meanwhile, what it gives alone, after `clear`."""
    try:
        return work()
    except Exception as error:
        if ahead is None:
            raise
        # While it traces, torch has its own in the place of nn.Module.__call__, in all threads.
        logger.debug("the plain pass broke off while a layer was compiled (%s: %s)", type(error).__name__, error, exc_info=True)
    ahead.join()  # only now: the memory that the exception held is free
    clear()
    return work()


def _given(layer: nn.Module, loss: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def take(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        raise _Given

    layer._compiled_call_impl = take
    try:
        loss()
    except _Given:
        pass
    finally:
        layer._compiled_call_impl = None
    if len(given) != 1 or not given[0][0] or not isinstance(given[0][0][0], Tensor):
        raise RuntimeError("its first layer is not called as layers are")
    return given[0]


def _copy(model: nn.Module, layer: nn.Module, parameters: Iterable[nn.Parameter]) -> nn.Module:
    """Modules of its own, around parameters of its own, which lie where the layer's do."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}  # no stray reference copies what is large
    memo |= {id(v): v for m in layer.modules() for v in vars(m).values() if isinstance(v, Kept)}  # a copied one would be empty
    memo |= {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    for p in (*layer.parameters(), *parameters):
        if type(p) is not nn.Parameter:
            raise RuntimeError(f"a parameter is a {type(p).__name__}")
        memo[id(p)] = nn.Parameter(p.data, p.requires_grad)
    return copy.deepcopy(layer, memo)
