"""Where a prefix enters an attention layer: in front of the keys and values that the layer's cache returns.

Here and not in the cache, so that gradient checkpointing, which takes the cache away from the layers, cannot take the prefix.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Around, Mixture, Site, base_class, modules
from weft.methods.virtual import Virtual, spliced

NAMES = ("past_key_values", "past_key_value", "layer_past")  # what attention layers call their cache
CROSS = re.compile(r"(?i)cross|encdec|encoder_?attn|encoder_?attention")  # layers that look at an encoder's output


class Behind:
    """A layer's cache with the prefix's keys and values in front of what it returns.

    past: the cache (None: there is none).  keys, values: (1 or n, heads, width, size).  cu: where packed rows begin.
    """

    def __init__(self, past: Any, keys: Tensor, values: Tensor, cu: Tensor | None) -> None:
        self.past = getattr(past, "self_attention_cache", past)
        self.keys, self.values, self.cu = keys, values, cu
        inner = past.extra if isinstance(past, Behind) else 0
        self.extra: int = keys.shape[-2] if past is None or inner else 0  # what the cache does not count already

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tokens = key.shape[-2]
        if self.past is not None:
            key, value = self.past.update(key, value, *args, **kwargs)
        return self._joined(self.keys, key, tokens), self._joined(self.values, value, tokens)

    def _joined(self, own: Tensor, given: Tensor, tokens: int) -> Tensor:
        own = own.to(given.device, given.dtype)
        both = torch.cat([own.expand(given.shape[0], -1, -1, -1), given], -2)
        if self.cu is None:
            return both
        rows = len(self.cu) - 1
        more = (given.shape[-2] - tokens) // rows  # what a prefix inside this one has put before every row
        cu = self.cu + more * torch.arange(rows + 1, device=self.cu.device)
        return both.index_select(-2, spliced(cu, own.shape[-2], given.shape[-2])[0])

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        return self.extra + (self.past.get_seq_length(*args, **kwargs) if self.past is not None else 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.past, name)


class PrefixDoor(Adapter):
    """Where the prefix of one attention layer comes in. It has no parameter of its own."""

    def __init__(self, whole: Virtual, layer: int, name: str, place: int) -> None:
        super().__init__()
        self.layer, self.name, self.place = layer, name, place
        self.__dict__["whole"] = whole  # not a submodule: its parameters are the model's site's

    def forward(self, layer: Site | Around, *inputs: Any, **kwargs: Any) -> Any:
        return self._through(layer, self.__dict__["whole"].block(self.layer)[:, None], inputs, kwargs)

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        doors: Any = mixture.adapters
        blocks = [door.__dict__["whole"].block(door.layer) for door in doors]
        width = max(b.shape[2] for b in blocks)
        stack = torch.stack([F.pad(b, (0, 0, width - b.shape[2], 0)) for b in blocks], 1)
        rows = mixture.owners(inputs[0] if inputs else kwargs["hidden_states"]).to(stack.device)
        return doors[0]._through(layer, stack[:, rows.clamp_min(0)], inputs, kwargs)

    def _through(self, layer: Any, both: Tensor, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("key_value_states") is not None or kwargs.get("encoder_hidden_states") is not None:
            return layer.frozen(*inputs, **kwargs)
        at = self.place < len(inputs)
        behind = Behind(inputs[self.place] if at else kwargs.get(self.name), both[0], both[1], kwargs.get("cu_seq_lens_q"))
        if at:
            return layer.frozen(*inputs[: self.place], behind, *inputs[self.place + 1 :], **kwargs)
        return layer.frozen(*inputs, **kwargs | {self.name: behind})


def attentions(model: Any) -> dict[str, tuple[nn.Module, str, int]]:
    """The self-attention layers that keep a cache: path -> (layer, the name of that argument, its place among the positional ones).

    Of an encoder-decoder, the decoder's."""
    found: dict[str, tuple[nn.Module, str, int]] = {}
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    inside = {id(m) for _, m in modules(decoder)}
    for path, module in modules(model):
        if id(module) not in inside or CROSS.search(path.rpartition(".")[2]):
            continue
        names = list(inspect.signature(base_class(module).forward).parameters)[1:]  # type: ignore[attr-defined]
        name = next((n for n in NAMES if n in names), None)
        if name is not None and not _declared_below(module):
            found[path] = (module, name, names.index(name))
    return found


def _declared_below(module: nn.Module) -> bool:
    below = (m for p, m in modules(module) if p)
    return any(n in inspect.signature(base_class(m).forward).parameters for m in below for n in NAMES)  # type: ignore[attr-defined]
