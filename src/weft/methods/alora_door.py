"""Where the tokens come in for an activated LoRA: the model itself as a site."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.core import WeftError
from weft.methods.invocation import NEVER, Gate, notes
from weft.methods.prompt_call import length
from weft.methods.virtual import Virtual


class Door(Virtual):
    """Tells the layers of an adapter which tokens are theirs. It has no parameter of its own and changes nothing of the call."""

    outer = 1  # around a prompt, which takes the tokens away

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def around(self, layer: Any, adapters: Sequence[Virtual], rows: Tensor | None, call: dict[str, Any]) -> Any:
        ids = self.ids(call)
        past = next((c for name in ("past_key_values", "cache_params") if (c := call.get(name)) is not None), None)
        place = length(past) + torch.arange(ids.shape[1], device=ids.device)
        begun: list[tuple[Gate, Tensor, Tensor]] = []
        every = None if rows is None else torch.zeros_like(ids, dtype=torch.bool)[..., None]
        for i, door in enumerate(adapters):
            if isinstance(door, Door):
                start = door.gate.starts(ids, past, packing(call, ids, past))
                off = ((start == NEVER) | (place < start))[..., None]
                if rows is not None and every is not None:
                    every = torch.where((rows == i)[:, None, None], off, every)
                    off = off[rows == i]
                door.look(off)
                begun.append((door.gate, start[:, -1], off))
        for gate, _, off in begun:
            gate.open(off, every)
        try:
            out = layer.frozen(**call)
        finally:
            for gate, *_ in begun:
                gate.open(None, None)
        values = list(out.values()) if hasattr(out, "keys") else list(out) if isinstance(out, tuple) else [out]
        for cache in [past] if past is not None else [v for v in values if hasattr(v, "get_seq_length")]:
            notes(cache).update({gate.key: start.clamp(max=length(cache) - 1) for gate, start, _ in begun})
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for value in (v for v in values if isinstance(v, Tensor) and v.requires_grad):
                for gate, _, off in begun:  # layers that are computed again in the backward pass ask again
                    value.register_hook(partial(gate.open, off, every))  # type: ignore[no-untyped-call]
        return out

    def ids(self, call: dict[str, Any]) -> Tensor:
        """(n, T) the tokens of a call."""
        given: Tensor | None = call.get("input_ids")
        if given is None:
            raise WeftError("ALoRA finds its invocation among input_ids, and this call has none: give them in place of inputs_embeds")
        return given

    def look(self, off: Tensor) -> None:
        """Warn if the training begins with a batch of which nothing is learned."""
        if not self.training or self.gate.tried or torch.compiler.is_compiling() or not len(off):
            return
        self.gate.tried = True
        if bool(off.all()):
            warnings.warn(
                f"no row of the first batch has the invocation tokens {self.gate.tokens}, so this ALoRA learns nothing from it: are they "
                "in the data, and does the tokenizer make the same tokens of them there?",
                stacklevel=2,
            )


def packing(call: dict[str, Any], ids: Tensor, past: Any) -> Tensor | None:
    """(1, T) bool, where the rows of a packed call begin: by its keywords, or by positions that begin anew; None if it is not packed."""
    cu, positions, mask = call.get("cu_seq_lens_q"), call.get("position_ids"), call.get("attention_mask")
    if cu is not None:
        starts = ids.new_zeros(ids.shape[0], ids.shape[1] + 1, dtype=torch.bool)  # empty rows at the end of a filled batch start behind it
        return starts.index_fill(1, cu[:-1].long(), True)[:, :-1]
    padded = isinstance(mask, Tensor) and mask.dim() == 2
    if positions is None or positions.dim() != 2 or ids.shape[0] > 1 or padded or length(past):
        return None
    begins: Tensor = positions == 0
    return begins
