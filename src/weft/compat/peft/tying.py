"""`ensure_weight_tying`: what an adapter does to an embedding, it does to the head that shares the embedding's weight."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

from torch import nn

from weft.compat.peft.kinds import PeftType
from weft.compat.peft.layers import framework, fronts
from weft.compat.peft.state import EMBEDDING_LAYER_NAMES
from weft.compat.peft.targets import match_target_against_key
from weft.compat.peft.wrappers import ModulesToSaveWrapper, wrap_whole
from weft.core import behind

_TIED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter,"
_CARE = (
    "This can lead to complications, for example when merging the adapter or converting your model to formats other than safetensors. "
    "Check the discussion here: https://github.com/huggingface/peft/issues/2777"
)


def tied(config: Any, model: Any, everything: Mapping[str, nn.Module]) -> tuple[str, list[str]]:
    """(the embedding's path, the paths of modules to be tied to it); none unless the configuration asks for it and the model ties any.

    `config` then names the embedding alone, in `modules_to_save` or `target_modules`, as in peft.
    """
    path, others = _sharing(model, everything)
    whole, targets = getattr(config, "modules_to_save", None) or [], getattr(config, "target_modules", None)
    saved, targeted = _named(config)
    if not getattr(config, "ensure_weight_tying", False):
        return path, []
    if not others:
        warnings.warn("You have requested `ensure_weight_tying`, but no tied modules were found in the model", stacklevel=6)
    elif not saved and not targeted:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or `target_modules`",
            stacklevel=6,
        )
    elif config.peft_type != PeftType.LORA:
        warnings.warn(f"{_TIED} but no implementation exists to tie the adapters. {_CARE}", stacklevel=6)
    else:
        if saved:
            kept = [m for m in whole if not any(re.match(rf"(^|.*\.){m}($|\..*)", o) for o in others)]
            config.modules_to_save = kept if path in kept else [*kept, path]
        elif not isinstance(targets, str):
            config.target_modules = {t for t in targets or () if not any(o == t or o.endswith(f".{t}") for o in others)} | {path}
        return path, others
    return path, []


def warn(config: Any, model: Any, everything: Mapping[str, nn.Module]) -> None:
    """Say so, as peft does, if an adapter stands on what the model ties and was not asked to be tied."""
    asked = getattr(config, "ensure_weight_tying", None)
    if not asked and any(_named(config)) and _sharing(model, everything)[1]:
        but = "no implementation exists to tie the adapters" if asked is None else "`ensure_weight_tying` is not set to True"
        warnings.warn(f"{_TIED} but {but}. {_CARE}", stacklevel=6)


def _named(config: Any) -> tuple[bool, bool]:
    """Whether an embedding or a head is among the modules to save, and among the targets."""
    whole, targets = getattr(config, "modules_to_save", None) or [], getattr(config, "target_modules", None)
    saved = any(m.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for m in whole)
    if isinstance(targets, str):
        return saved, any(match_target_against_key(targets, n) for n in EMBEDDING_LAYER_NAMES)
    return saved, any(t.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for t in targets or ())


def _sharing(model: Any, everything: Mapping[str, nn.Module]) -> tuple[str, list[str]]:
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False) or not hasattr(model, "get_input_embeddings"):
        return "", []
    embedding: Any = model.get_input_embeddings()
    while isinstance(embedding, ModulesToSaveWrapper):
        embedding = embedding.original_module
    embedding = behind(embedding)
    weight = getattr(embedding, "weight", None)
    path = next((p for p, m in everything.items() if m is embedding), "")
    return path, [p for p, m in everything.items() if m is not embedding and weight is not None and m._parameters.get("weight") is weight]


def tie_whole(model: Any, config: Any, name: str, active: bool, path: str, others: list[str]) -> None:
    """Give the modules tied to the embedding a copy for this adapter that has the embedding's copy as its weight."""
    found = dict(framework(model))
    source = found.get(path)
    if not others or not isinstance(source, ModulesToSaveWrapper) or name not in source.modules_to_save:
        return
    wrap_whole(model, SimpleNamespace(modules_to_save=others, inference_mode=config.inference_mode), name, active)
    for other in others:
        wrapper = model.get_submodule(other)
        cast(Any, wrapper.modules_to_save[name]).weight = source.modules_to_save[name].weight


def tie_factors(model: Any, name: str, path: str, others: list[str]) -> None:
    """Let the adapter of a tied module be the embedding's, turned: A = B_embᵀ and B = A_embᵀ, in the same memory."""
    found = {f.get_base_layer(): f for f in fronts(model) if name in f.trains}
    at = {p: m for p, m in ((p, behind(m)) for p, m in framework(model)) if p in (path, *others)}
    source = found.get(at.get(path, model))
    for other in others if source is not None else ():
        target = found.get(at[other])
        if source is None or target is None:
            continue
        from_: Any = source.slot[name]
        to: Any = target.slot[name]
        if from_.A.is_meta:
            continue
        if to.A.shape != from_.B.T.shape:
            raise ValueError(f"{other} has another rank than {path}, to which it is tied: leave it out of rank_pattern")
        for mine, theirs in (("A", "B"), ("B", "A")):
            flag = to._parameters[mine].requires_grad
            to._parameters[mine] = nn.Parameter(from_._parameters[theirs].detach().T, requires_grad=flag)
