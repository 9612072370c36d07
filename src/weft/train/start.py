"""How a run's adapter begins: by its method alone, from what packing the base lost (LoftQ), or from the training data (EVA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import weft.adapters
from weft.adapters.attach import build, check_new
from weft.adapters.eva import eva
from weft.adapters.loftq import Lost
from weft.core import Method, WeftError
from weft.data import Batch, Batches
from weft.methods import LoRA
from weft.methods.lora_init import ELSEWHERE
from weft.models import load_base
from weft.models.load import skeleton
from weft.step import loss_sum, warm
from weft.train.evaluate import evaluating
from weft.train.output import Output
from weft.train.recipe import Recipe

LOOKS_AT = 8  # micro-batches that EVA sees


def load(recipes: Sequence[Recipe], outputs: Sequence[Output]) -> Any:
    """The recipes' one base. The LoRAs that begin with what packing it loses are on it already, but for runs that go on anyway."""
    first = recipes[0]
    compiled = torch.cuda.is_available() and first.train.device != "cpu" if first.train.compile is None else first.train.compile
    if compiled:
        warm(torch.device("cuda" if first.train.device == "auto" else first.train.device))
    begin = [r for r, output in zip(recipes, outputs, strict=True) if _start(r.method) == "loftq" and output.latest() is None]
    frame = skeleton(first.model)
    _check(frame, recipes)
    if begin and getattr(frame.config, "quantization_config", None) is not None:
        raise WeftError(f"method.init: loftq begins with what packing loses, and {first.model} is packed in its file: give the 16-bit one")
    lost = {r.name: Lost(frame, r.method) for r in begin if isinstance(r.method, LoRA)}

    def packed(*told: Any) -> None:
        for one in lost.values():
            one(*told)

    device = None if first.train.device == "auto" else first.train.device
    model = load_base(first.model, base=first.base, device=device, on_packed=packed)
    for name, one in lost.items():
        one.attach(model, name)
    return model


def _check(frame: nn.Module, recipes: Sequence[Recipe]) -> None:
    """Makes the shapes of each recipe's adapter for a model without weights: to load a large base first would take minutes.

    Raises:
        WeftError: with all that `weft.adapt` will not do.
    """
    wrong = []
    for recipe in recipes:
        method = recipe.method if _start(recipe.method) is None else replace(recipe.method, init="kaiming")
        try:
            check_new(frame, recipe.name)
            with torch.device("meta"):
                build(frame, method)
        except WeftError as e:
            wrong.append(f"run {recipe.name}: {e}" if len(recipes) > 1 else str(e))
    if wrong:
        raise WeftError("\n".join(wrong))


def attach(model: nn.Module, recipe: Recipe, batches: Batches, output: Output) -> None:
    """A new adapter of the recipe's method. Raises WeftError if it begins with what packing lost: it would be there already."""
    how = _start(recipe.method)
    if how is None or not isinstance(recipe.method, LoRA):
        weft.adapters.adapt(model, recipe.method, recipe.name)
    elif output.latest() is not None:  # every number of it comes from there
        weft.adapters.adapt(model, replace(recipe.method, init="kaiming"), recipe.name)
    elif how == "eva":
        with evaluating(model):
            eva(model, recipe.method, _unpadded(batches), name=recipe.name, call=_calling(model))
    else:
        raise WeftError(
            f"method.init: {how} begins with what packing loses, which this model cannot tell any more. `weft train` packs it as it loads; "
            f"for weft.fit, call weft.loftq_(model, method, {recipe.base!r}, name={recipe.name!r}) on the model in 16 or 32 bits first"
        )


def _start(method: Method) -> str | None:
    init = getattr(method, "init", None) if isinstance(method, LoRA) else None
    return init if init in ELSEWHERE else None


def _calling(model: nn.Module) -> Callable[[Batch], Any]:
    device = next(model.parameters()).device
    return lambda batch: loss_sum(model, batch.to(device))


def _unpadded(batches: Batches) -> Iterator[Batch]:
    """The first batches of the first epoch; where they are padded, row by row, since what fills them up is no data."""
    for batch in batches.epoch(0)[:LOOKS_AT]:
        if batch.attention_mask is None:
            yield batch
            continue
        for i, n in enumerate(batch.attention_mask.sum(1).tolist()):
            ids, places, targets = (t[i : i + 1, :n] for t in (batch.input_ids, batch.position_ids, batch.targets))
            yield Batch(ids, places, targets, None, None, int((targets >= 0).sum()), n)
