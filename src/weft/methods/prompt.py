"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained vectors in front of the embedded input.

    x' = [P; E(x)]        P ∈ ℝ^{V × width}

The row's own tokens stand at positions V, V+1, …. What the model returns is that of the own tokens: the V places are taken out again,
where peft leaves them in (docs/decisions/0007). Of an encoder-decoder the encoder's input gets the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from weft.core import Adapter, Around, Method, Mixture, Site, modules, plain
from weft.methods.prompt_call import begun_with, check_start, grown, packed, shortened
from weft.methods.virtual import Virtual, called, front


class Prompt(Virtual):
    """P (V · copies, width): peft keeps a second, unused V for encoder-decoders."""

    def __init__(self, tokens: int, P: Tensor, inside: bool) -> None:
        super().__init__()
        self.columns, self.inside = tokens, inside  # inside: a door at the encoder puts the prompt in
        self.P = nn.Parameter(P)

    def values(self) -> Tensor:
        """(V · copies, width)"""
        return self.P

    def around(self, layer: Any, adapters: Sequence[Virtual], rows: Tensor | None, call: dict[str, Any]) -> Any:
        where = front([a.columns for a in adapters], rows)
        if self.inside:
            mask = call.get("attention_mask")
            return layer.frozen(**call if mask is None else call | {"attention_mask": where.mask(mask)})
        own = stacked(adapters, where.width, rows)
        key = str(id(adapters[0]) if rows is None else sorted(map(id, adapters)))  # of whom a cache is
        keep = call.get("logits_to_keep", 0)
        full = isinstance(keep, int) and keep == 0  # else the logits are those of the places asked for
        if call.get("cu_seq_lens_q") is not None:
            changed, places = packed(layer, call, own, where.width)
            return shortened(layer.frozen(**changed), where.width, places, full)
        changed, inserted = grown(layer, call, own, where, key)
        out = layer.frozen(**changed)
        cache = getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)
        if cache is not None:
            cache.weft_prompts = {key, *getattr(cache, "weft_prompts", ())}
        return shortened(out, where.width if inserted else 0, None, full)


def stacked(adapters: Sequence[Any], width: int, rows: Tensor | None) -> Tensor:
    """(1 or n, width, d): what stands in front of each row."""
    prompts = [a.values()[: a.columns] if a.columns else None for a in adapters]
    if rows is None:
        assert prompts[0] is not None
        alone: Tensor = prompts[0][None]
        return alone
    some = next(p for p in prompts if p is not None)
    full = [torch.zeros_like(some[:1]).expand(width, -1) if p is None else nn.functional.pad(p, (0, 0, width - len(p), 0)) for p in prompts]
    every: Tensor = torch.stack([*full, torch.zeros_like(full[0])])[rows]
    return every


class PromptDoor(Adapter):
    """The encoder of an encoder-decoder, where its prompt comes in: `generate` calls it without the model around it."""

    def __init__(self, whole: Prompt) -> None:
        super().__init__()
        self.__dict__["whole"] = whole

    def forward(self, layer: Site | Around, *inputs: Any, **kwargs: Any) -> Any:
        return self._through(layer, [self], None, called(layer, inputs, kwargs))

    @classmethod
    def mixed(cls, mixture: Mixture, layer: Site, *inputs: Any, **kwargs: Any) -> Any:
        call = called(layer, inputs, kwargs)
        doors: Any = mixture.adapters
        rows = mixture.owners(call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"])
        return doors[0]._through(layer, doors, rows, call)

    def _through(self, layer: Any, doors: Sequence[Any], rows: Tensor | None, call: dict[str, Any]) -> Any:
        prompts = [door.__dict__["whole"] for door in doors]
        where = front([p.columns for p in prompts], rows)
        mask, ids = call.get("attention_mask"), call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        if mask is not None and mask.shape[1] > ids.shape[1]:  # the model's site has been here
            call = call | {"attention_mask": mask[:, where.width :]}
        return layer.frozen(**grown(layer, call, stacked(prompts, where.width, rows), where, "")[0])


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trains vectors in front of the embedded input.

    Args:
        tokens: V, how many (peft's num_virtual_tokens).
        init: "vocab": the embeddings of tokens drawn by lot; "text": those of `text`, repeated or cut to V; "random": N(0, 1), as peft's.
        text: What "text" begins from.
        tokenizer: The folder or hub id of the tokenizer for it; None: the model's own.
        copies: 2 where a file of peft's holds 2V vectors (encoder-decoders, where it uses the first V); leave it at 1.
        targets: The path of the transformers model that is to get them; "": the model itself.
    """

    tokens: int = 20
    init: Literal["vocab", "text", "random"] = "vocab"
    text: str | None = None
    tokenizer: str | None = None
    copies: int = 1
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
            inside = bool(model.config.is_encoder_decoder)
            check_start(self)
            made[path] = whole = self.made(model.get_input_embeddings(), model, inside)
            if inside:
                encoder = next(p for p, m in modules(model) if m is model.get_encoder())
                made[f"{path}.{encoder}" if path else encoder] = PromptDoor(whole)
        return made

    def made(self, embedding: Any, model: Any, inside: bool) -> Prompt:
        """The adapter, starting as `init` says."""
        rows, start = self.tokens * self.copies, torch.empty(self.tokens * self.copies, embedding.embedding_dim)
        if start.is_meta or self.init == "random":
            return Prompt(self.tokens, start.normal_(), inside)
        chosen = begun_with(self, model, rows)
        with torch.no_grad():
            return Prompt(self.tokens, embedding(chosen.to(embedding.weight.device)).float().cpu().clone(), inside)
