"""`weft train`: from a recipe, flags, or both, to a saved adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from weft.cli.common import say, step
from weft.cli.main import UsageError, parser_of

SWITCHES = ("-h", "--help", "--overwrite", "--print-recipe", "--debug")
VALUED = ("--resume",)
SHORT = {"--profile": "--train.profile=true", "--no-self-check": "--train.self_check=false"}  # settings under a shorter name


def arguments(parser: argparse.ArgumentParser, methods: Sequence[str] | None = None) -> None:
    """All flags; of the methods' own those of `methods`. If that names none, no settings either, which `parse` leaves to `load_recipe`."""
    parser.usage = "weft train [RECIPE.yaml] [--data.train FILE] [--method.rank 16] [--train.lr 1e-3] [...]"
    parser.epilog = (
        "A flag goes over what the recipe says. Values are written as in YAML: true, null, [a, b], {q_proj: 8}.\n\n"
        "  weft train --data.train rows.jsonl\n"
        "  weft train recipe.yaml --method.rank 8 --output adapters/rank8\n\n"
        "A run that was stopped goes on where it was when the same command is given again.\n"
        "The help of another method: weft train --method DoRA --help"
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="settings; those it does not name keep their defaults")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto",
                        help="auto: go on with an unfinished run of this recipe; never: that is an error (default: auto)")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="write a trace and a table of where the time of three steps goes")
    parser.add_argument("--no-self-check", action="store_true", help="do not hold the fast step against the plain one first")
    parser.add_argument("--print-recipe", action="store_true", help="print the whole recipe as YAML, defaults filled in, and stop")
    if methods is None or methods:
        with step("loading libraries", tell=False):
            from weft.cli import settings
        settings.add(parser, methods)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command's own flags through argparse; settings are left to `load_recipe`, which tells all that is wrong with them at once."""
    if {"-h", "--help"} & set(words):
        parser_of("train", [_method(words)]).print_help()
        raise SystemExit(0)
    own: list[str] = []
    recipes: list[str] = []
    flags: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if word in SWITCHES:
            own.append(word)
        elif name in VALUED:
            own += [word] if equals or not rest else [word, rest.pop(0)]
        elif word in SHORT:
            flags.append(SHORT[word])
        elif not word.startswith("-"):
            recipes.append(word)
        elif near := get_close_matches(word, (*SWITCHES, *VALUED), n=1, cutoff=0.75):
            raise UsageError(f"unknown flag {word}; did you mean {near[0]}?")
        else:
            flags += [word] if equals or not rest or rest[0].startswith("--") else [word, rest.pop(0)]
    if len(recipes) > 1:
        hint = "A list is one word: --data.train '[a.jsonl, b.jsonl]'"
        raise UsageError(f"one recipe at a time, not {len(recipes)}: {', '.join(recipes)}. {hint}")
    args = parser_of("train", []).parse_args(own)
    args.recipe, args.flags = recipes[0] if recipes else None, flags
    return args


def _method(words: Sequence[str]) -> str:
    """The method that `--method` names among these words, or the default one."""
    named = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word == "--method"]
    named += [word.partition("=")[2] for word in words if word.startswith("--method=")]
    if not named:
        return "LoRA"
    with step("loading libraries", tell=False):
        import weft.methods  # noqa: F401 (which fills METHODS)
        from weft.core import METHODS
    if named[-1] not in METHODS:
        lower = {name.lower(): name for name in METHODS}
        near = get_close_matches(named[-1].lower(), lower, n=1)
        hint = f"did you mean {lower[near[0]]}?" if near else f"there are {', '.join(sorted(METHODS))}"
        raise UsageError(f"there is no method {named[-1]!r}; {hint}")
    return named[-1]


def run(args: argparse.Namespace) -> int:
    if args.recipe is None and not args.flags:
        raise UsageError("what to train on? weft train --data.train rows.jsonl, or weft train recipe.yaml. See: weft train --help")
    with step("loading libraries", tell=False):
        from weft.train import dump_recipe, load_recipes
    recipes = load_recipes(args.recipe, args.flags)
    if args.print_recipe:
        print("---\n".join(map(dump_recipe, recipes)), end="")
        return 0
    with step("loading libraries", tell=False):
        from weft.train import run_recipe, run_recipes
    if len(recipes) > 1:
        results = run_recipes(recipes, resume=args.resume, overwrite=args.overwrite)
        losses = {r.adapter: r.eval_loss for r in results if r.eval_loss is not None}
        if losses and recipes[0].train.progress != "off":
            best = min(losses, key=lambda folder: losses[folder])
            say(f"the lowest eval loss is that of {best.name}; try it: weft generate --adapter {best}")
        return 0
    recipe = recipes[0]
    result = run_recipe(recipe, resume=args.resume, overwrite=args.overwrite)
    if recipe.train.progress != "off":
        say(f"try it: weft generate --adapter {Path(result.adapter)}")
    return 0
