"""What a prepared step puts on modules themselves: calls use it, and neither files nor copies of a module get any of it."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

STEP = "weft_step"  # where a model has the step that is at work on it
NAMES = "weft_placed"  # where a module has the names of what was put on it


def put(module: nn.Module, **what: Any) -> None:
    """Attributes of the object itself, past its parameters and submodules; `take` gives back what its class has."""
    here = vars(module)
    here[NAMES] = here.get(NAMES, frozenset()) | what.keys()
    here.update(what, __getstate__=MethodType(_state, module))  # `pickle` and `copy` ask the object, and then its class


def take(module: nn.Module, *names: str) -> None:
    here = vars(module)
    for name in names:
        here.pop(name, None)
    left = here.pop(NAMES, frozenset()) - set(names)
    if left:
        here[NAMES] = left
    else:
        here.pop("__getstate__", None)


def forward_of(module: nn.Module, forward: Any) -> None:
    """Put a function in the place of its forward: one for all of a kind, so that all layers share one compiled graph."""
    put(module, forward=MethodType(forward, module))


def close_earlier(model: nn.Module) -> None:
    """Close the step that is at work on a model, if one is."""
    earlier = vars(model).get(STEP)
    if earlier is not None:
        earlier.close()


def ended(model: nn.Module, step: Any) -> bool:
    """Take a step off its model; False where another was prepared since, which closed this one."""
    if vars(model).get(STEP, step) is not step:
        return False
    take(model, STEP)
    return True


def _state(self: Any) -> Any:
    """What its class would give, without all that."""
    own: Any = type(self)
    state = own.__getstate__(self)
    if not isinstance(state, dict):
        return state
    gone = {*state[NAMES], NAMES, "__getstate__"}
    state = {name: value for name, value in state.items() if name not in gone}
    state["_parameters"] = {k: p if p is None or p.is_contiguous() else _Within(p) for k, p in self._parameters.items()}
    state["_state_dict_hooks"] = OrderedDict((k, h) for k, h in self._state_dict_hooks.items() if h is not in_one_piece)
    return state


def in_one_piece(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A hook for `state_dict`: what saves a model takes weights for contiguous. Who asks for the parameters themselves gets those."""
    for name, p in layer._parameters.items():
        if p is not None and not isinstance(state[f"{prefix}{name}"], nn.Parameter):
            state[f"{prefix}{name}"] = state[f"{prefix}{name}"].contiguous()


class _Within:
    """A parameter whose rows do not lie end to end, in a file or a copy: there it is put in one piece, so that none is held here."""

    def __init__(self, p: nn.Parameter) -> None:
        self.p = p

    def __reduce__(self) -> Any:
        return _whole, (self.p.detach(), self.p.requires_grad)

    def __deepcopy__(self, memo: Any) -> Any:
        return deepcopy(self.p, memo)  # which puts it in one piece


def _whole(t: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(t.clone(memory_format=torch.contiguous_format), requires_grad)


def apart(part: Tensor) -> Tensor:
    """Rows of a matrix, in the same memory, as a storage of their own: what saves or shares tensors takes a storage for one tensor."""
    row = part.stride(0) * part.itemsize
    start = part.storage_offset() * part.itemsize
    own = part.untyped_storage()[start : start + len(part) * row]
    return part.new_empty(0).set_(own, 0, part.shape, part.stride())
