"""Training: the recipe, the loop, checkpoints that resume bit for bit, metrics, evaluation."""

from weft.train.evaluate import Match, answers, exact_match, mean_loss
from weft.train.fit import Result, fit, run_recipe
from weft.train.guard import Diverged, Interrupted
from weft.train.reading import dump_recipe, load_recipe, load_recipes, settings, to_dict
from weft.train.recipe import EvalConfig, Recipe, TrainConfig
from weft.train.together import fit_together, run_recipes

__all__ = [
    "Diverged", "EvalConfig", "Interrupted", "Match", "Recipe", "Result", "TrainConfig", "answers", "dump_recipe", "exact_match", "fit",
    "fit_together", "load_recipe", "load_recipes", "mean_loss", "run_recipe", "run_recipes", "settings", "to_dict",
]  # fmt: skip
