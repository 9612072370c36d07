"""`weft extract`: the low-rank adapter that comes nearest to a model fine-tuned whole."""

from __future__ import annotations

import argparse
from pathlib import Path

from weft.cli.common import check_device, out, step
from weft.cli.main import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tuned", metavar="TUNED", help="the fine-tuned model's folder")
    parser.add_argument("--model", metavar="M", default="embedded", help='the base that it was made from: a folder, or "embedded"')
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder for the adapter")
    parser.add_argument("--rank", type=int, default=None, metavar="R", help="rank of every layer (default: 16)")
    parser.add_argument("--energy", type=float, default=None, metavar="E",
                        help="in place of a rank: the share of the squared difference to keep in each layer, 0.95 say")  # fmt: skip
    parser.add_argument("--targets", metavar="T", nargs="+", default=None, help="the layers to look at (default: all-linear)")
    parser.add_argument("--modules-to-save", metavar="M", nargs="+", default=None,
                        help="what to keep whole of what else changed: names as for --targets, or `changed` for all of it")  # fmt: skip
    parser.add_argument("--device", default=None, metavar="D", help="where to decompose: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that OUT holds")


def run(args: argparse.Namespace) -> int:
    target = Path(args.output).expanduser()
    check_adapter_target(target, args.overwrite)
    check_device(args.device)
    with step("loading libraries", tell=False):
        import weft
        from weft.core import WeftError
    targets = "all-linear" if args.targets is None else tuple(args.targets)
    saved = args.modules_to_save or ()
    with step(f"comparing {args.tuned} with {args.model}"):
        try:
            kept = weft.extract(
                args.model, args.tuned, args.rank, energy=args.energy, output=target, targets=targets, device=args.device,
                modules_to_save="changed" if saved == ["changed"] else tuple(saved),
            )  # fmt: skip
        except WeftError as e:
            raise WeftError(_as_flags(str(e))) from None
    out().print(f"{_as_flags(str(kept))}\nwritten to {target}", markup=False)
    return 0


def _as_flags(text: str) -> str:
    return text.replace('modules_to_save="changed"', "--modules-to-save changed")


def check_adapter_target(target: Path, overwrite: bool) -> None:
    """Raise UsageError unless an adapter may be written to this folder."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file: choose a folder for the adapter")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{target} is not empty: choose another folder, or replace the adapter that is there with --overwrite")
    if not (target / "adapter_config.json").is_file():
        raise UsageError(f"{target} holds no adapter, so --overwrite would mix one with something else: choose another folder")
