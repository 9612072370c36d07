"""Training: the recipe, the loop, checkpoints that resume bit for bit, metrics, evaluation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public name -> the module it lives in. Loaded on first use: help and a recipe's mistakes wait neither for transformers nor for the step.
_HOME = {
    "Match": "evaluate",
    "answers": "evaluate",
    "exact_match": "evaluate",
    "mean_loss": "evaluate",
    "Result": "single",
    "fit": "single",
    "run_recipe": "single",
    "Diverged": "guard",
    "Interrupted": "guard",
    "dump_recipe": "reading",
    "load_recipe": "reading",
    "load_recipes": "reading",
    "settings": "reading",
    "to_dict": "reading",
    "EvalConfig": "recipe",
    "Recipe": "recipe",
    "TrainConfig": "recipe",
    "fit_together": "together",
    "run_recipes": "together",
}
__all__ = [*sorted(_HOME)]

if TYPE_CHECKING:
    from weft.train.evaluate import Match, answers, exact_match, mean_loss
    from weft.train.guard import Diverged, Interrupted
    from weft.train.reading import dump_recipe, load_recipe, load_recipes, settings, to_dict
    from weft.train.recipe import EvalConfig, Recipe, TrainConfig
    from weft.train.single import Result, fit, run_recipe
    from weft.train.together import fit_together, run_recipes


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weft.train' has no attribute {name!r}")
    value = getattr(import_module(f"weft.train.{_HOME[name]}"), name)
    globals()[name] = value
    return value
