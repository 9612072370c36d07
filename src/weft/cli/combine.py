"""`weft combine`: several adapters made into one."""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from weft.cli.common import Given, base_of, load, out, step
from weft.cli.extract import check_adapter_target
from weft.cli.main import UsageError

WAYS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # as in weft.combine


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", metavar="DIR=WEIGHT", nargs="+", help="a folder and its weight: legal=0.7 code=-0.3 (default: 1)")
    parser.add_argument("--model", metavar="M", help='a folder, a hub id, or "embedded"; left out: the base of the first adapter')
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder for the new adapter")
    parser.add_argument("--how", choices=WAYS, default="linear", help="what becomes of the updates (default: linear)")
    parser.add_argument("--rank", type=int, default=None, metavar="R", help="rank of the result, where it is approximated")
    parser.add_argument("--density", type=float, default=None, metavar="P", help="the share of elements that ties, dare and pruning keep")
    parser.add_argument("--majority", choices=("total", "frequency"), default="total", help="how ties elects a sign (default: total)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what dare drops (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that OUT holds")


def run(args: argparse.Namespace) -> int:
    target = Path(args.output).expanduser()
    check_adapter_target(target, args.overwrite)
    given: list[tuple[Given, float]] = []
    for word in args.parts:
        given.append(_part(word, {"base", *(g.name for g, _ in given)}))
    if clash := next((g for g, _ in given if g.folder.resolve() == target.resolve()), None):
        raise UsageError(f"{clash.folder} is one of the parts: choose another folder for the new adapter")
    model, _ = load(base_of(args.model, [g for g, _ in given]), [g for g, _ in given], "fp32", "cpu")
    import weft

    with step("combining"):
        weights = {g.name: weight for g, weight in given}
        options = {"rank": args.rank, "density": args.density, "majority": args.majority, "seed": args.seed}
        kept = weft.combine(model, weights, "combined", args.how, **options)
    weft.save(model, target, "combined")
    out().print(f"{kept}\nwritten to {target}", markup=False)
    return 0


def _part(word: str, taken: set[str]) -> tuple[Given, float]:
    """The adapter and its weight, from DIR=WEIGHT or DIR. It has its folder's name, and a number where that is taken."""
    folder, equals, weight = word.rpartition("=")
    if Path(word).expanduser().exists() or not equals:
        folder, weight = word, "1"
    path = Path(folder).expanduser()
    name = path.resolve().name.replace(".", "-")
    try:
        free = name if name not in taken else next(n for i in count(2) if (n := f"{name} ({i})") not in taken)
        return Given(free, path), float(weight)
    except ValueError:
        raise UsageError(f"{word}: {weight!r} is no weight; write {folder}=0.5, say") from None
