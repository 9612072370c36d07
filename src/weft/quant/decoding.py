"""Layers of any other class with packed parameters, such as fused experts: their own forward, given the numbers."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.quant.experts import in_dtype, one_by_one_pays, routable, routed
from weft.quant.formats import FORMATS
from weft.quant.grouped import groupable, grouped
from weft.quant.layers import Quantised


class Decoding(Quantised):
    """The mixin of any other layer with packed parameters, such as fused experts (experts, ...): its own forward, given the numbers.

    Of experts that `routed` can compute one after another, one at a time is decoded; of those that `grouped` can compute all at once, one
    parameter at a time. Else all of the layer's numbers are decoded for one call. Autograd keeps none of them: what it would save is
    decoded again, by experts.
    """

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        packed = {name: self.tensors(name) for name in self.shapes if self.is_packed(name)}
        if not packed:
            return super().forward(*inputs, **kwargs)
        if len(packed) == len(self.shapes) and not kwargs and routable(self, self.shapes, inputs):
            if one_by_one_pays(self, inputs[0]):
                return routed(self, *inputs)
            if groupable(self, inputs[0]):
                return grouped(self, *inputs)
        dtype = in_dtype(self, inputs)
        numbers = {name: self.form.unpack(held, self.shapes[name], dtype) for name, held in packed.items()}
        shell: Any = object.__new__(self.own)  # the same state under the layer's own class
        shell.__dict__ = self.__dict__
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return torch.func.functional_call(shell, numbers, inputs, kwargs)
        keep = _Forget(self, numbers, packed, dtype)
        with torch.autograd.graph.saved_tensors_hooks(keep.pack, keep.unpack):
            return torch.func.functional_call(shell, numbers, inputs, kwargs)


class _Forget:
    """Instead of a view of decoded experts autograd keeps where in which weight it lies."""

    def __init__(self, layer: Decoding, numbers: dict[str, Tensor], packed: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> None:
        self.form, self.dtype, self.packed = layer.form, dtype, packed
        self.shapes = {name: layer.shapes[name] for name in packed}
        self.owner = {t.untyped_storage().data_ptr(): name for name, t in numbers.items()}

    def pack(self, t: Tensor) -> Any:
        name = self.owner.get(t.untyped_storage().data_ptr()) if t.dtype == self.dtype else None
        return t if name is None else (name, t.shape, t.stride(), t.storage_offset())

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        name, size, stride, offset = kept
        shape = self.shapes[name]
        each = shape[1:].numel()
        first, reach = offset // each, sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if (offset % each) + reach < each:
            part = self.form.part(self.packed[name], shape, first)
            if part is not None:
                whole = self.form.unpack(part, shape[1:], self.dtype)
                return whole.as_strided(size, stride, offset - first * each)
        return self.form.unpack(self.packed[name], shape, self.dtype).as_strided(size, stride, offset)


class _Made(type):
    """The kind of the classes made here, which have no importable name; pickle goes by the class that each was made from."""

    own: type


@cache
def _decoding(own: type) -> type:
    return _Made(f"Quant{own.__name__}", (Decoding, own), {"__module__": own.__module__, "own": own})


copyreg.pickle(_Made, lambda made: (_decoding, (made.own,)))  # type: ignore[arg-type, return-value]


def with_packed(
    module: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, torch.Size], base: str, dtype: torch.dtype
) -> None:
    """Let parameters of any module be packed (name -> tensors, name -> shape as numbers): its class is swapped in place."""
    quant = cast(Decoding, module)
    module.__dict__.update(form=FORMATS[base], dtype=dtype, shapes=dict(shapes))
    own: Any = type(module)
    module.__class__ = _decoding(own)
    for name, held in tensors.items():
        quant.hold(name, held)
