"""Parameters of a layer trained whole: the adapter holds its own fp32 copy, and the base keeps its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter
from weft.core.errors import WeftError
from weft.core.layers import logical, numbers
from weft.core.site import Around, Site, base_class, plain


class Replaced(Adapter):
    """The layer computed with this adapter's parameters in place of its own of the same names.

    Args:
        layer: Any module; only parameters that it owns itself are replaced.
        names: Which of them ("weight", "bias").
        shared: Copies made so far, by the id of the base parameter, so that tied parameters stay tied.
    """

    def __init__(self, layer: Site, names: Sequence[str], shared: dict[int, nn.Parameter] | None = None) -> None:
        super().__init__()
        shared = {} if shared is None else shared
        for name in names:
            own = cast(nn.Module, layer)._parameters[name]
            assert own is not None
            if id(own) not in shared:
                shape, dtype = logical(layer, name)
                # a fresh empty tensor, not a copy: under torch.device("meta") nothing is allocated
                shared[id(own)] = nn.Parameter(torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32)))
                if not shared[id(own)].is_meta:
                    shared[id(own)].data.copy_(numbers(layer, name))
            self.register_parameter(name, shared[id(own)])

    def forward(self, layer: Site | Around, *inputs: Any, **kwargs: Any) -> Any:
        module = plain(layer)
        if type(layer) is Around:  # not Part: the rows of several models, no adapter before this one
            raise WeftError("an adapter that replaces a layer whole must come first: weft.use(model, ['full', 'lora'])")
        base: Any = object.__new__(base_class(module))  # the same state under the base's own class, so that its forward has no slot
        base.__dict__ = module.__dict__
        own = {name: p.to(logical(module, name)[1]) for name, p in self._parameters.items() if p is not None}
        return torch.func.functional_call(base, own, inputs, kwargs)

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._parameters.items() if p is not None}
