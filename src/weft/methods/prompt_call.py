"""A call of a model with vectors in front of its embedded input, and its output without their places."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from weft.core import WeftError
from weft.methods.virtual import Front, check_positions, counts_positions, model_of, spliced, takes


def embedded(layer: Any, call: dict[str, Any]) -> Tensor:
    """(n, T, d): the input's own vectors."""
    given = call.get("inputs_embeds")
    return model_of(layer).get_input_embeddings()(call["input_ids"]) if given is None else given  # type: ignore[no-any-return]


def check_start(method: Any, by_lot: bool = False) -> None:
    """Raises WeftError for no tokens, a start from text without a text, and one from tokens where it can only be `by_lot`."""
    wrong = [f"tokens={method.tokens} must be 1 or more"] if method.tokens < 1 else []
    if method.init == "text" and not method.text:
        wrong.append("init='text' needs text='…'")
    if method.init in ("text", "vocab") and by_lot:
        wrong.append(f"init={method.init!r} takes a decoder and no projection, which begins by lot")
    if wrong:
        raise WeftError(f"{type(method).__name__}: {', and '.join(wrong)}")


def begun_with(method: Any, model: Any, rows: int) -> Tensor:
    """(rows,) the tokens that a prompt begins with: those of `method.text`, repeated or cut, or drawn by lot from the vocabulary."""
    if method.init == "vocab":
        return torch.randint(0, model.get_input_embeddings().num_embeddings, (rows,))
    tokenizer = sys.modules["transformers"].AutoTokenizer.from_pretrained(method.tokenizer or model.config.name_or_path)
    ids = tokenizer(method.text)["input_ids"]
    return torch.tensor((ids * (rows // len(ids) + 1))[:rows])


def length(past: Any) -> int:
    """Tokens in a cache; of one that holds a recurrent state, whether there is one."""
    if past is None or not getattr(past, "layers", None):
        return 0
    if hasattr(past.layers[0], "keys"):
        return int(past.get_seq_length())
    return int(past.has_previous_state())


def grown(layer: Any, call: dict[str, Any], own: Tensor, where: Front, key: str) -> tuple[dict[str, Any], bool]:
    """The call with `own` (1 or n, C, d) in front, and whether it was put in: with a filled cache it is there already."""
    name = "cache_params" if "cache_params" in takes(layer) else "past_key_values"
    past, mask, positions = call.get(name), call.get("attention_mask"), call.get("position_ids")
    begun = length(past) > 0
    if begun and key not in getattr(past, "weft_prompts", ()):
        raise WeftError("this cache was begun without the prompt that is active now: begin with an empty one")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise WeftError(
            "a prompt needs an attention mask of two dimensions (n, length): 1 for a token, 0 for padding. A static cache makes another "
            "one: generate with the dynamic cache"
        )
    x = embedded(layer, call)
    n, T, C = x.shape[0], x.shape[1], where.width
    check_positions(layer, where)
    if mask is None and where.lengths is not None:
        if "attention_mask" not in takes(layer):
            raise WeftError(f"{type(model_of(layer)).__name__} takes no attention mask: rows with different prompts cannot share a batch")
        mask = torch.ones(n, T + max(length(past) - C, 0), dtype=torch.long, device=x.device)
    changed = dict(call)
    if mask is not None:
        changed["attention_mask"] = mask = where.mask(mask)
    places = T if begun else C + T
    if positions is None and mask is not None and counts_positions(layer):
        changed["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -places:]
    elif positions is not None:
        moved = positions + where.shift
        if not begun:
            first = torch.arange(C, device=x.device)[None] - (C - where.shift)
            moved = torch.cat([first.clamp_min(0).expand(*moved.shape[:-1], C), moved], -1)
        changed["position_ids"] = moved
    if begun:
        return changed, False
    changed |= {"input_ids": None, "inputs_embeds": torch.cat([own.to(x.device, x.dtype).expand(n, -1, -1), x], 1)}
    if call.get("token_type_ids") is not None:
        changed["token_type_ids"] = torch.nn.functional.pad(call["token_type_ids"], (C, 0))
    if call.get("labels") is not None and call["labels"].shape[:2] == (n, T):
        changed["labels"] = torch.nn.functional.pad(call["labels"], (C, 0), value=-100)
    for name in ("start_positions", "end_positions"):
        if call.get(name) is not None:
            changed[name] = call[name] + C
    keep = call.get("logits_to_keep")
    if isinstance(keep, Tensor):
        changed["logits_to_keep"] = keep + C
    return changed, True


def packed(layer: Any, call: dict[str, Any], own: Tensor, width: int) -> tuple[dict[str, Any], Tensor]:
    """The packed call with the one prompt (1, C, d) before every row; and where the own tokens stand now."""
    x, cu = embedded(layer, call), call["cu_seq_lens_q"]
    source, place = spliced(cu, width, x.shape[1])
    moved = torch.cat([torch.arange(width, device=x.device), call["position_ids"][0] + width])
    more = width * torch.arange(len(cu), device=cu.device, dtype=cu.dtype)
    begin = cu + more
    changed = call | {
        "input_ids": None,
        "inputs_embeds": torch.cat([own[0].to(x.device, x.dtype), x[0]]).index_select(0, source)[None],
        "position_ids": moved[source][None],
        "cu_seq_lens_q": begin, "cu_seq_lens_k": begin if call["cu_seq_lens_k"] is cu else call["cu_seq_lens_k"] + more,
        "max_length_q": call["max_length_q"] + width, "max_length_k": call["max_length_k"] + width,
    }  # fmt: skip
    keep = call.get("logits_to_keep")
    return changed | ({"logits_to_keep": place[keep]} if isinstance(keep, Tensor) else {}), place


SEQUENCES = ("logits", "last_hidden_state", "start_logits", "end_logits", "hidden_states", "prediction_logits")


def shortened(out: Any, drop: int, place: Tensor | None, of_logits: bool) -> Any:
    """A model's output without its first `drop` places, or at `place` alone. of_logits: whether the logits have those places too."""
    if not drop:
        return out
    if not hasattr(out, "keys"):
        raise WeftError("with a prompt a model's output must have names: leave return_dict=False out")

    def own(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(own(v) for v in value)
        return value[:, drop:] if place is None else value.index_select(1, place)

    for name in SEQUENCES:
        value = out.get(name)
        classes = isinstance(value, Tensor) and name == "logits" and value.dim() == 2  # one answer a row: (n, classes)
        if value is not None and not classes and (of_logits or "logits" not in name):
            out[name] = own(value)
    return out
