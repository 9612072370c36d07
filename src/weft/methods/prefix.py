"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): trained keys and values before those of every attention layer.

    softmax(q [Pₖ; K]ᵀ / √d) [Pᵥ; V]        Pₖ, Pᵥ ∈ ℝ^{V × heads × size} for each layer

with `projection`, P = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂ for a small E (V, width): the paper's reparameterisation, which peft drops when it saves.
The row's own tokens stand at positions V, V+1, …, and the prefix at 0 to V-1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core import Adapter, Method, Site, WeftError, base_class, plain
from weft.methods.prefix_cache import ahead, new_cache, of_tokens, widened
from weft.methods.prefix_door import PrefixDoor, attentions
from weft.methods.prompt_call import begun_with, check_start
from weft.methods.virtual import Virtual, check_positions, counts_positions, front, model_of


class Prefix(Virtual):
    """P (V, 2·layers·heads·size): the key of layer l is block 2l, its value block 2l+1."""

    outer = -1  # inside a prompt, which would take the longer cache for one that has begun

    def __init__(self, method: PrefixTuning, layers: int, heads: int, size: int, model: Any) -> None:
        super().__init__()
        twice = bool(model.config.is_encoder_decoder)
        self.ahead, self.layers, self.heads, self.size, self.twice = method.tokens, layers, heads, size, twice
        width = 2 * layers * heads * size
        if method.projection:
            hidden = method.hidden or heads * size
            self.E = nn.Parameter(torch.randn(method.tokens, heads * size))
            self.W1, self.b1 = _linear(heads * size, hidden)
            self.W2, self.b2 = _linear(hidden, width, method.init == "zero")
        else:
            start = torch.randn(method.tokens, width)
            if method.init in ("text", "vocab") and not start.is_meta:
                start = of_tokens(model, begun_with(method, model, method.tokens))
            self.P = nn.Parameter(torch.zeros_like(start) if method.init == "zero" else start)

    def values(self, part: slice = slice(None)) -> Tensor:
        """P, or those of its columns."""
        if "P" in self._parameters:
            return self.P[:, part]
        return F.linear(torch.tanh(F.linear(self.E, self.W1, self.b1)), self.W2[part], self.b2[part])

    def block(self, layer: int) -> Tensor:
        """(2, heads, V, size): key and value of one layer. Of an encoder-decoder's peft reads every other pair, round and round."""
        first = 4 * layer % (2 * self.layers) if self.twice else 2 * layer
        each = self.heads * self.size
        both = self.values(slice(first * each, (first + 2) * each))
        return both.view(self.ahead, 2, self.heads, self.size).permute(1, 2, 0, 3)

    def around(self, layer: Any, adapters: Sequence[Virtual], rows: Tensor | None, call: dict[str, Any]) -> Any:
        model, where = model_of(layer), front([a.ahead for a in adapters], rows)
        side = "decoder_" if model.config.is_encoder_decoder else ""
        mask, places, past = f"{side}attention_mask", f"{side}position_ids", call.get("past_key_values")
        asked = call.get("use_cache")
        keeps = past is not None or (bool(model.config.use_cache if asked is None else asked) and bool(model.can_generate()))
        past = new_cache(model, keeps) if past is None else past
        positions, given = call.get(places), call.get(mask)
        cu = call.get("cu_seq_lens_q")
        if cu is not None:
            more = where.width * torch.arange(len(cu), device=cu.device, dtype=cu.dtype)
            call = call | {"cu_seq_lens_k": call["cu_seq_lens_k"] + more, "max_length_k": call["max_length_k"] + where.width}
        else:
            ids = next(call[n] for n in (f"{side}input_ids", f"{side}inputs_embeds") if call.get(n) is not None)
            if given is None and where.lengths is not None:
                given = ids.new_ones(ids.shape[0], past.get_seq_length() + ids.shape[1], dtype=torch.long)
            check_positions(layer, where)
            if isinstance(given, Tensor) and given.dim() == 2:
                if positions is None and counts_positions(layer):
                    positions = (given.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
                call = call | {mask: where.mask(given)}
            elif given is not None:
                call = call | {mask: widened(given, where)}
        if positions is not None:
            call = call | {places: positions + where.shift}
        out = layer.frozen(**call | {"past_key_values": ahead(past, where.width, keeps)})
        if getattr(out, "past_key_values", None) is None:
            return out
        if keeps:
            out["past_key_values"] = past
            return out
        return type(out)(**{k: v for k, v in out.items() if k != "past_key_values"})


def _linear(inside: int, outside: int, zero: bool = False) -> tuple[nn.Parameter, nn.Parameter]:
    made = nn.Linear(inside, outside)
    return nn.Parameter(made.weight.data * (not zero)), nn.Parameter(made.bias.data * (not zero))


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Trains keys and values in front of every attention layer's own.

    Args:
        tokens: V, how many places the prefix has (peft's num_virtual_tokens).
        projection: Train it through the paper's small network; what is used and saved is its result.
        hidden: The width of that network; None: that of a layer's keys.
        init: "normal": N(0, 1), as peft's; "zero"; "text": the keys and values that the base has for the tokens of `text`, repeated or cut
            to V, so that it begins as that text in front; "vocab": those of tokens drawn by lot.
        text: What "text" begins as.
        tokenizer: The folder or hub id of the tokenizer for it; None: the model's own.
        targets: The path of the transformers model that is to get it; "": the model itself.
    """

    tokens: int = 20
    projection: bool = False
    hidden: int | None = None
    init: Literal["normal", "zero", "text", "vocab"] = "normal"
    text: str | None = None
    tokenizer: str | None = None
    targets: str | tuple[str, ...] = ""

    layered: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-2
    site: ClassVar[str] = "a transformers model (the model itself, targets='')"

    def accepts(self, layer: nn.Module) -> bool:
        return hasattr(layer, "config") and hasattr(layer, "get_input_embeddings")

    def build(self, layer: Site, path: str) -> Adapter:
        return self.build_all({path: layer})[path]

    def build_all(self, layers: Mapping[str, Site]) -> dict[str, Adapter]:
        made: dict[str, Adapter] = {}
        for path, site in layers.items():
            model: Any = plain(site)
            doors = attentions(model)
            if not doors:
                raise WeftError(f"PrefixTuning: {base_class(model).__name__} has no attention layer with a cache; PromptTuning needs none")
            check_start(self, by_lot=self.projection or model.config.is_encoder_decoder)
            config = model.config.get_text_config(decoder=True)
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
            whole = Prefix(self, len(doors), heads, size, model)
            made[path] = whole
            for i, (where, (_, name, place)) in enumerate(doors.items()):
                made[f"{path}.{where}" if path else where] = PrefixDoor(whole, i, name, place)
        return made
