"""An adapter: a small trainable module that stands around one frozen layer; and a mixture, where each row has its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from weft.core.errors import WeftError
from weft.core.layers import features, is_conv1d, is_linear, logical
from weft.core.site import Around, Part, Site, base_class, plain

if TYPE_CHECKING:
    from weft.core.method import Method


AnyAdapter = TypeVar("AnyAdapter", bound="Adapter")


class Adapter(nn.Module):
    """Advice around a frozen layer. Parameters are fp32 masters, made on the CPU so that a seed means the same on every device."""

    method: Method  # who built it; set by `adapt` and `load`
    fixed: frozenset[str] = frozenset()  # names of parameters that files hold and training leaves as they are
    outer: ClassVar[int] = 0  # of several around one layer those with more stand further out; those with as much, as the caller said
    kin: ClassVar[type[Adapter] | None] = None  # the class whose `mixed` serves rows of several kinds at once; None: its own kind alone

    def forward(self, layer: Site | Around, *inputs: Any, **kwargs: Any) -> Any:
        """What the layer now computes; `layer.frozen(*inputs)` is what it computed before."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def ready(self) -> None:
        """Called when the parameters are in their place, for what is derived from them: new ones, loaded ones."""

    def merged(self, layer: Site | Around) -> dict[str, Tensor]:
        """The parameters, in fp32 and in the layer's own layout, of the one plain layer that computes what layer and adapter do together.

        Found by probing: a linear map is known by its values at 0 and at the unit vectors, an embedding by its rows.
        Override it where a closed form exists; call it on `masters(adapter)`. Raises WeftError for a layer that probing cannot see through.
        """
        module = plain(layer)
        device = next(self.parameters()).device
        if isinstance(module, nn.Embedding):
            return {"weight": self(layer, torch.arange(module.num_embeddings, device=device)).float()}
        if not is_linear(module):
            raise WeftError(f"{type(self).__name__} cannot be merged into a {base_class(module).__name__}")
        eye = torch.eye(features(module)[0], dtype=logical(module)[1], device=device)
        bias = self(layer, torch.zeros_like(eye[:1]))[0].float()
        weight = (self(layer, eye).float() - bias).T
        return {"weight": weight.T if is_conv1d(module) else weight, "bias": bias}

    def unmergeable(self, layer: Site) -> str | None:
        """Why this adapter cannot be merged into this layer; None if it can."""
        return None

    def tie(self, key: str) -> nn.Parameter | None:
        """The parameter that alone decides what becomes of the layer's `key`: tied layers that have one in common stay tied when merged."""
        return self._parameters.get(key)

    def penalty(self) -> Tensor | float:
        """What the method adds to the loss for this layer (a scalar)."""
        return 0.0

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        """Row i of the batch through `mixture.adapters[mixture.rows[i]]`, or through the bare layer where that is -1.

        This one goes adapter by adapter and is right for every method; override it where one pass can serve all.
        """
        rows = mixture.owners(inputs[0])
        out: Tensor | None = None
        for slot in sorted(set(rows.tolist())):
            mine = (rows == slot).nonzero().squeeze(1)
            part = [t[mine] if isinstance(t, Tensor) and t.shape[:1] == rows.shape else t for t in inputs]
            y = layer.frozen(*part, **kwargs) if slot < 0 else mixture.adapters[slot](layer, *part, **kwargs)
            out = y.new_zeros(len(rows), *y.shape[1:]) if out is None else out
            out = out.index_copy(0, mine, y)
        return out

    @classmethod
    def side_by_side(cls, mixture: Mixture, layer: Site, x: Tensor) -> Tensor:
        """A linear layer where the lines of x (lines, ..., in) lie span by span, as in `mixture.spans`, or a multiple of lines does.

        Slices and whole products: gathered rows, as `mixed` may take them, have a backward pass that scatters.
        """
        y: Tensor = layer.frozen(x)
        each = x.shape[0] // sum(mixture.counts)
        counts = [n * each for n in mixture.counts]
        parts = zip(mixture.spans, torch.split(x, counts), torch.split(y, counts), strict=True)
        return torch.cat([y if slot < 0 else mixture.adapters[slot].forward(Part(layer, x, y), x) for (slot, *_), x, y in parts])


def masters(adapter: AnyAdapter) -> AnyAdapter:
    """The adapter with its numbers in fp32, where updates are formed: itself, but where somebody cast a whole model to 16 bits."""
    held = (adapter._parameters, adapter._buffers)
    if not any(t is not None and t.is_floating_point() and t.itemsize < 4 for tensors in held for t in tensors.values()):
        return adapter
    twin: AnyAdapter = object.__new__(type(adapter))
    twin.__dict__ = adapter.__dict__ | {
        "_parameters": {k: p if p is None else nn.Parameter(p.detach().float(), p.requires_grad) for k, p in adapter._parameters.items()},
        "_buffers": {k: b.float() if b is not None and b.is_floating_point() else b for k, b in adapter._buffers.items()},
    }
    return twin


_version = attrgetter("_version")


class Mixture:
    """What a site does inside `weft.rows(...)`: every row of the batch through its own adapter, or through none.

    Args:
        rows: (n,) the place of each row's adapter in `adapters`, or -1.
        path: The site's, for errors.
        lengths: Tokens of each row, where all lie end to end in one sequence (a packed batch): for linear layers alone.
    """

    def __init__(self, adapters: Sequence[Adapter], rows: Tensor, path: str, lengths: Sequence[int] | None = None) -> None:
        self.adapters, self.rows, self.path = tuple(adapters), rows, path
        kinds = {type(a).kin or type(a) for a in adapters}
        self.kind: type[Adapter] = kinds.pop() if len(kinds) == 1 else Adapter
        self.parameters: tuple[nn.Parameter, ...] | None = None
        self.cache: dict[Any, Any] = {}  # for `mixed`: whatever it wants to keep from one call to the next
        self.packed = lengths is not None
        self.spans = _spans(rows.tolist(), lengths)
        self.counts = [stop - start for _, start, stop in self.spans]
        self.even = len(set(self.counts)) == 1 and min(self.spans)[0] >= 0  # whether all spans have an adapter and one length
        self.together = len({slot for slot, *_ in self.spans}) == len(self.spans)  # whether each owner's rows are neighbours

    def versions(self) -> tuple[int, ...] | None:
        """How often each weight has been written to: what `mixed` derives from weights holds while these stay. None: not known."""
        if self.parameters is None:  # not before they are asked for: in training a mixture lives for one step
            self.parameters = tuple(p for a in self.adapters for p in a.parameters())
        return None if any(p.is_inference() for p in self.parameters) else tuple(map(_version, self.parameters))

    def owners(self, x: Tensor) -> Tensor:
        """(rows of x,) the adapter of each row of x. Beam search repeats every row: k beams of row i stand side by side."""
        n, given = x.shape[0], len(self.rows)
        if n == given:
            return self.rows
        if n % given == 0 and (x.dim() > 2 or not x.is_floating_point()):
            return self.rows.repeat_interleave(n // given)
        raise WeftError(
            f"weft.rows was given {given} names, but {self.path or 'the model'} received {n} rows. Give one name for every row."
        )

    def forward(self, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        if self.packed:
            return self._packed(layer, *inputs, **kwargs)
        # Adapters that train together own long spans of neighbouring rows. Either way each is called once, with all its rows in order.
        if torch.is_grad_enabled() and self.together and is_linear(layer) and len(inputs) == 1:
            self.owners(inputs[0])  # as many rows as there are names, or a multiple
            return self.kind.side_by_side(self, layer, inputs[0])
        return self.kind.mixed(self, layer, *inputs, **kwargs)

    def _packed(self, layer: Site, x: Tensor, *inputs: Any, **kwargs: Any) -> Tensor:
        plain = is_linear(layer) and not (inputs or kwargs)
        if not plain or x.shape[:-1].numel() != sum(self.counts):
            here = f"not here, where {x.shape[:-1].numel()} tokens came and the rows have {sum(self.counts)}" if plain else "not here"
            raise WeftError(
                f"{self.path or 'the model'}: rows of a packed batch can have adapters of their own on linear layers that see every token, "
                f"{here}: pad the rows (data.packing: false)"
            )
        y = self.kind.side_by_side(self, layer, x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


def _spans(owners: Sequence[int], lengths: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """(owner, first, behind the last) of each run of neighbours with one owner: in rows, or in tokens where the rows' lengths are given."""
    edges = [i for i in range(len(owners)) if i == 0 or owners[i] != owners[i - 1]]
    ends = range(len(owners) + 1) if lengths is None else [0, *accumulate(lengths)]
    return [(owners[a], ends[a], ends[b]) for a, b in zip(edges, [*edges[1:], len(owners)], strict=True)]
