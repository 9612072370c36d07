"""Training: the recipe, the loop, checkpoints that resume bit for bit, metrics, evaluation."""

from weft.train.evaluate import Match, answers, exact_match, mean_loss
from weft.train.fit import Result, fit, run_recipe
from weft.train.guard import Diverged, Interrupted
from weft.train.reading import dump_recipe, load_recipe, settings, to_dict
from weft.train.recipe import EvalConfig, Recipe, TrainConfig

__all__ = [
    "Diverged", "EvalConfig", "Interrupted", "Match", "Recipe", "Result", "TrainConfig", "answers", "dump_recipe", "exact_match", "fit",
    "load_recipe", "mean_loss", "run_recipe", "settings", "to_dict",
]  # fmt: skip
