"""What prompt methods share: they stand on the model itself, and put something in front of every row of its input.

A prompt (`methods/prompt.py`) is tokens without words: its rows go in front of the embedded input. A prefix (`methods/prefix.py`) is
keys and values in front of those of every attention layer. Rows of one batch may have different ones, or none: then what is in front is
filled up at its own front, and masked there.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.core import Adapter, Around, Mixture, Site, WeftError, base_class, modules, plain


class Virtual(Adapter):
    """An adapter of the model itself. `ahead`: how many keys it puts before each attention layer's. `columns`: how many tokens, in front
    of the input."""

    ahead: int = 0
    columns: int = 0

    def around(self, layer: Any, adapters: Sequence[Virtual], rows: Tensor | None, call: dict[str, Any]) -> Any:
        """The model called with these adapters' parts in front. rows: (n,) the adapter of each row, or -1; None: the one of all."""
        raise NotImplementedError(f"{type(self).__name__} does not say how the model is called")

    def forward(self, layer: Site | Around, *inputs: Any, **kwargs: Any) -> Any:
        return self.around(layer, [self], None, called(layer, inputs, kwargs))

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        call = called(layer, inputs, kwargs)
        several: Any = mixture.adapters
        kinds = {type(a).around: a for a in sorted(several, key=lambda a: -a.outer)}
        rows = mixture.owners(_ids(call))
        return Each(layer, list(kinds.values()), several, rows).frozen(**call)


Virtual.kin = Virtual


class Each:
    """The model with the adapters of one kind after another around it."""

    def __init__(self, layer: Any, kinds: list[Virtual], adapters: Sequence[Virtual], rows: Tensor) -> None:
        self.layer, self.kinds, self.adapters, self.rows = layer, kinds, adapters, rows

    def frozen(self, **call: Any) -> Any:
        if not self.kinds:
            return self.layer.frozen(**call)
        first, *others = self.kinds
        return first.around(Each(self.layer, others, self.adapters, self.rows), self.adapters, self.rows, call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def model_of(layer: Any) -> Any:
    """The module itself."""
    while isinstance(layer, Each):
        layer = layer.layer
    return plain(layer)


@dataclass(frozen=True)
class Front:
    """What stands in front of n rows, right-aligned in `width` places.

    lengths: (n, 1) how long each row's own is.  there: (n, width), whether a place is taken. Both None: all rows have the same, whole.
    """

    width: int
    lengths: Tensor | None = None
    there: Tensor | None = None

    @property
    def shift(self) -> Any:
        """By how much the positions of each row's own tokens move."""
        return self.width if self.lengths is None else self.lengths

    def mask(self, own: Tensor) -> Tensor:
        """The attention mask (n, width + length) of a row's own (n, length)."""
        there = own.new_ones(own.shape[0], self.width) if self.there is None else self.there.to(own.dtype)
        return torch.cat([there, own], 1)


def front(sizes: Sequence[int], rows: Tensor | None) -> Front:
    """sizes: of each adapter's part.  rows: (n,) the adapter of each row, -1 for none; None: the first adapter's for all."""
    if rows is None:
        return Front(sizes[0])
    width = max(sizes)
    lengths = torch.tensor([*sizes, 0], device=rows.device)[rows][:, None]
    return Front(width, lengths, torch.arange(width, device=rows.device) >= width - lengths)


_names: dict[type, tuple[str, ...]] = {}


def takes(layer: Any) -> tuple[str, ...]:
    """The names of what the model's own forward takes, in order."""
    cls = base_class(model_of(layer))
    if cls not in _names:
        _names[cls] = tuple(inspect.signature(cast(Any, cls).forward).parameters)[1:]
    return _names[cls]


def called(layer: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call of the model with every argument under its name."""
    return dict(zip(takes(layer), inputs, strict=False)) | kwargs


def _ids(call: dict[str, Any]) -> Tensor:
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "encoder_outputs", "decoder_inputs_embeds")
    found = next((call[n] for n in names if call.get(n) is not None), None)
    if found is None:
        raise WeftError("weft.rows with a prompt or prefix needs input_ids or inputs_embeds, to know how many rows there are")
    return found if isinstance(found, Tensor) else found[0]


def spliced(cu: Tensor, width: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A packed sequence with `width` places before every row: (what each place takes of [front, tokens], where each token went)."""
    rows, columns, own = (torch.arange(k, device=cu.device) for k in (len(cu) - 1, width, tokens))
    place = own + width * (1 + torch.repeat_interleave(rows, cu.diff().long(), output_size=tokens))
    first = (cu[:-1].long() + width * rows)[:, None] + columns
    source = torch.empty(tokens + width * len(rows), dtype=torch.long, device=cu.device)
    return source.index_copy(0, first.flatten(), columns.repeat(len(rows))).index_copy(0, place, width + own), place


def counts_positions(layer: Any) -> bool:
    """Whether the positions of this model's tokens may be told to it: a language model that takes them, and places no images itself."""
    model = model_of(layer)
    own = model.config.get_text_config() is model.config and not model.config.is_encoder_decoder
    return own and "position_ids" in takes(layer) and bool(model.can_generate())


def check_positions(layer: Any, where: Front) -> None:
    """Raises WeftError where rows with fronts of different length would be placed wrongly: a model that numbers its tokens alone."""
    model = model_of(layer)
    if where.lengths is None or counts_positions(layer) or len(set(where.lengths.flatten().tolist())) == 1:
        return
    if any(isinstance(m, nn.Embedding) and "position" in p for p, m in modules(model)):
        raise WeftError(
            f"{base_class(model).__name__} numbers the places of its tokens itself, so the rows of one batch cannot have prompts of "
            "different length (or none): give each length a batch of its own"
        )
