"""LoRA on parameters that are no layer's weight: the fused experts of a mixture-of-experts module, all in one tensor.

    W'_e = W_e + s · B_e A_e        W (experts, out, in), or (experts, in, out) where the module says that it is transposed

A (experts · rank, in) holds the experts one after another; B (out, rank · experts) has the expert as its fastest index (peft's layout). A
parameter of two dimensions is one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from weft.core import Adapter, Around, Method, Mixture, Site, WeftError, base_class, logical, matcher, numbers, plain, several
from weft.methods import experts
from weft.methods.experts import Update
from weft.quant import Quantised, routable
from weft.quant.experts import in_dtype

if TYPE_CHECKING:
    from weft.methods.lora import LoRA


class LowRankParameters(Adapter):
    """The updates of some parameters of one module. Experts that keep transformers' contract go the ways of `experts`, others `whole`.

    Args:
        names: Which parameters; the first one is the outermost in peft's files. Their factors are A0 and B0, A1 and B1, ...
    """

    def __init__(self, method: LoRA, layer: Site, path: str, names: Sequence[str]) -> None:
        super().__init__()
        self.names, self.ranks, self.scales = tuple(names), [], []
        for i, name in enumerate(names):
            shape = logical(layer, name)[0]
            experts, outside, inside = shape if len(shape) == 3 else (1, *shape)
            if _transposed(layer):
                outside, inside = inside, outside
            rank, scale = method.scaled(f"{path}.{name}")
            self.ranks.append(rank)
            self.scales.append(scale)
            self.register_parameter(f"A{i}", method.first(torch.empty(experts * rank, inside), rank))
            self.register_parameter(f"B{i}", nn.Parameter(torch.zeros(outside, rank * experts)))

    def factors(self, module: Any) -> dict[str, Update]:
        """A (experts, rank, in), B (experts, out, rank) and s of each parameter."""
        found = {}
        for i, (name, scale) in enumerate(zip(self.names, self.scales, strict=True)):
            shape = logical(module, name)[0]
            experts = shape[0] if len(shape) == 3 else 1
            A, B = cast(Tensor, self._parameters[f"A{i}"]), cast(Tensor, self._parameters[f"B{i}"])
            found[name] = (A.view(experts, -1, A.shape[1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1), scale)
        return found

    def updates(self, module: Any) -> dict[str, Tensor]:
        """s · B_e A_e of each parameter, fp32, in the parameter's own layout."""
        found = {}
        for name, (A, B, scale) in self.factors(module).items():
            delta = scale * (B @ A)
            found[name] = (delta.mT if _transposed(module) else delta).reshape(logical(module, name)[0])
        return found

    def forward(self, layer: Site | Around, *inputs: Any, **kwargs: Any) -> Any:
        module, seen, stack = plain(layer), layer, [self]
        while type(seen) is Around and isinstance(seen.inner, LowRankParameters):  # several that are active add up
            stack.append(seen.inner)
            seen = seen.layer
        if type(seen) is Around:
            raise WeftError("an adapter on the parameters of a module stands beside its like only; let one of them work at a time")
        if not kwargs and routable(module, {name for a in stack for name in a.names}, inputs):
            updates: dict[str, list[Update]] = {}
            for adapter in stack:
                for name, update in adapter.factors(module).items():
                    updates.setdefault(name, []).append(update)
            way = experts.way(module, updates, inputs[0])
            if way is not None:
                return way(module, updates, *inputs)
        return whole(module, stack, *inputs, **kwargs)

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        module = plain(layer)
        return {name: numbers(module, name).float() + delta.detach() for name, delta in self.updates(module).items()}

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        """Experts see all tokens of all rows in one list, row after row, so that each row has as many tokens as any other."""
        tokens, rows = inputs[0].shape[0], len(mixture.rows)
        if inputs[0].dim() == 2 and tokens % rows == 0:
            spread = Mixture(mixture.adapters, mixture.rows.repeat_interleave(tokens // rows), mixture.path)
            return super().mixed(spread, layer, *inputs, **kwargs)
        return super().mixed(mixture, layer, *inputs, **kwargs)


def whole(module: Any, stack: Sequence[LowRankParameters], *inputs: Any, **kwargs: Any) -> Any:
    """What any module computes with W + s·BA in its parameters' places: the twin of `experts`, at a weight-sized sum for each of them."""
    total: dict[str, Tensor] = {}
    for adapter in stack:
        for name, delta in adapter.updates(module).items():
            total[name] = total[name] + delta if name in total else delta
    base: Any = object.__new__(base_class(module))  # the same state under the base's own class, so that its forward has no slot
    base.__dict__ = module.__dict__
    dtype = {name: in_dtype(module, inputs) if isinstance(module, Quantised) else logical(module, name)[1] for name in total}
    own = {name: (numbers(module, name) + delta.to(logical(module, name)[1])).to(dtype[name]) for name, delta in total.items()}
    return torch.func.functional_call(base, own, inputs, kwargs)


def _transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))


def on_parameters(method: LoRA, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    """The adapters that `method.target_parameters` asks for, by the path of the module that owns them."""
    if not method.target_parameters:
        return {}
    unfit = {"dropout": method.dropout, "lora_bias": method.lora_bias}
    unfit[f"init={method.init!r}"] = method.from_base or method.init == "orthogonal"
    unfit[type(method).__name__] = Method not in type(method).__bases__  # a variant of LoRA with more than two factors
    wrong = [f"{what} is not for parameters" for what, is_set in unfit.items() if is_set]
    owned = {f"{path}.{name}": (path, name) for path, m in modules.items() for name, p in m._parameters.items() if p is not None}
    chosen: dict[str, list[str]] = {}
    for target in several(method.target_parameters):
        hits = [owned[full] for full in owned if matcher(target)(full)]
        deep = [f"{p}.{n}" for p, n in hits if len(logical(modules[p], n)[0]) not in (2, 3)]
        if not hits or deep:
            wrong.append(f"target_parameters={target!r} matches " + (f"{deep[0]}, which is no matrix" if deep else "no parameter"))
        for path, name in hits:
            chosen.setdefault(path, []).append(name)
    if wrong:
        experts = sorted({full.rpartition(".")[2] for full, (p, n) in owned.items() if len(logical(modules[p], n)[0]) == 3})
        raise WeftError("\n".join(wrong) + f"\nParameters with an axis of experts here: {', '.join(experts) or 'none'}")
    built: dict[str, Adapter] = {}
    for path, names in chosen.items():
        module = modules[path]
        built[path] = LowRankParameters(method, cast(Site, module), path, [n for n in reversed(module._parameters) if n in names])
    return built
