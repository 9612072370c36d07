"""Trainable tokens in the layout of peft's adapter files: a type of their own, and beside LoRA and AdaLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weft.adapters.formats.base import COMMON, PREFIX, Field, Format, checked, short_names
from weft.adapters.formats.common import START, names
from weft.core import Adapter, Method
from weft.methods import TrainableTokens
from weft.methods.token_rows import Ids, TokenRows, TokenRowsBeside

_DELTA = "trainable_tokens_delta"  # peft's name: it holds the rows themselves, no difference
NAMES: dict[type[Adapter], dict[str, str]] = {TokenRows: {"E": _DELTA}, TokenRowsBeside: {"E": f"token_adapter.{_DELTA}"}}
TOKENS: dict[str, Field] = {"trainable_token_indices": Field("trainable_token_indices")}  # of LoRA's configuration
FIELDS: dict[str, Field] = COMMON | {"token_indices": Field("tokens"), "init_weights": START}


def _write(method: TrainableTokens, model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    named = [p for p, a in adapters.items() if isinstance(a, TokenRows) and not a.follows]
    where = named[0] if len(named) == 1 else short_names(model, named)  # a path and no list, as peft: it warns of tied names in a list
    return {"token_indices": list(method.tokens), "target_modules": where, "init_weights": True}


def _read(config: Mapping[str, Any]) -> Method:
    checked(config, FIELDS, "set of trainable tokens")
    given = config.get("target_modules")
    return TrainableTokens(tokens=tuple(config.get("token_indices") or ()), targets=names(given) if given else "auto")


def _give(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """peft writes the rows once more for every layer that is tied to the embedding."""
    return {f"{PREFIX}{p}.{_DELTA}": a.E.detach().clone().cpu() for p, a in adapters.items() if isinstance(a, TokenRows) and a.follows}


def beside(method: Any, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """LoRA's `trainable_token_indices`: for the input embedding, or by the paths of the layers that were named."""
    given = method.trainable_token_indices
    rows = {p: a for p, a in adapters.items() if isinstance(a, TokenRows) and not a.follows}
    by_path = {p: list(a.tokens) for p, a in rows.items()}
    return {"trainable_token_indices": (by_path if isinstance(given, Mapping) else list(given)) if given else None}


def tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameter that LoRA's `trainable_token_indices` means."""
    given: Any = config.get("trainable_token_indices") or ()
    held: Ids | dict[str, Ids] = {n: tuple(ids) for n, ids in given.items()} if isinstance(given, Mapping) else tuple(given)
    return {"trainable_token_indices": held}


FORMATS: dict[type[Method], Format] = {TrainableTokens: Format("TRAINABLE_TOKENS", _write, _read, FIELDS, give=_give, keeps=False)}
