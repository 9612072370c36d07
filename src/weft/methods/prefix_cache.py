"""How long a prefix makes a model's cache look. The cache itself holds real tokens only: beam search and batches need nothing else.

The model asks its cache how many keys there are, and makes positions and masks of the answer; the keys come in at the attention layers.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.core import WeftError


class Ahead:
    """Mixin in front of a cache's class: a cache as the model's own code sees it when `weft_ahead` keys stand before each layer's."""

    weft_ahead: int
    weft_keeps: bool

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_seq_length(*args, **kwargs) + self.weft_ahead  # type: ignore[misc]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        length, offset = super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]
        return length + self.weft_ahead, offset

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(key, value, *args, **kwargs) if self.weft_keeps else (key, value)  # type: ignore[misc]


_made: dict[type, type] = {}


def ahead(cache: Any, width: int, keeps: bool) -> Any:
    """The same cache, its content shared, looking `width` keys longer. keeps: whether it stores what it is given."""
    seen = copy.copy(cache)
    if hasattr(cache, "self_attention_cache"):
        seen.self_attention_cache = ahead(cache.self_attention_cache, width, keeps)
        return seen
    if isinstance(cache, Ahead):
        seen.weft_ahead += width
        return seen
    cls = type(cache)
    if cls not in _made:
        _made[cls] = type(f"Ahead{cls.__name__}", (Ahead, cls), {"__module__": cls.__module__})
    seen.__class__ = _made[cls]
    seen.weft_ahead, seen.weft_keeps = width, keeps
    return seen


def new_cache(model: Any, keeps: bool) -> Any:
    """An empty cache of the kind that the model would make. transformers is there, since the model is one of its own."""
    caches = sys.modules["transformers.cache_utils"]
    config = {"config": model.config.get_text_config(decoder=True)} if keeps else {}
    if model.config.is_encoder_decoder:
        return caches.EncoderDecoderCache(caches.DynamicCache(**config), caches.DynamicCache(**config))
    return caches.DynamicCache(**config)


def of_tokens(model: Any, ids: Tensor) -> Tensor:
    """(V, 2·layers·heads·size): the prefix that is these tokens, (V,) int64: what each layer's cache holds of them."""
    cache, training = new_cache(model, keeps=True), model.training
    model.eval()
    with torch.no_grad():
        model(input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True)
    model.train(training)
    if any(layer.keys.shape[-2] != len(ids) for layer in cache.layers):
        raise WeftError("init: a prefix of tokens needs the bare base, weft.use(model, None), and fewer tokens than its sliding window")
    blocks = [kind[0].transpose(0, 1).flatten(1) for layer in cache.layers for kind in (layer.keys, layer.values)]
    return torch.cat(blocks, 1).float().cpu()


def widened(given: Any, where: Any) -> Any:
    """A mask that is made already, (n, 1, queries, keys) or one for each kind of layer, with the prefix in front."""
    if isinstance(given, dict):
        return {kind: widened(one, where) for kind, one in given.items()}
    if not isinstance(given, Tensor) or given.dim() != 4 or where.lengths is not None:
        raise WeftError("a prefix needs an attention mask of two dimensions (n, length): 1 for a token, 0 for padding")
    return F.pad(given, (where.width, 0), value=1 if given.dtype == torch.bool else 0)
