"""`weft merge`: an adapter folded into its base, written as a plain transformers folder."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from weft.cli.common import (
    Given,
    base_of,
    check_device,
    load,
    model_arguments,
    no_bars,
    out,
    packed_file,
    say,
    settings_of,
    step,
)
from weft.cli.main import UsageError

PROBE = (
    "The quick brown fox jumps over the lazy dog. Write the following date as ISO 8601: the third of May, 1998.\n"
    "def add(a, b):\n    return a + b\n"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, many=False)
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="folder for the merged model")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="number format of what is written; auto: the one the base is stored in (default: auto)")  # fmt: skip
    parser.add_argument("--onto", choices=("source", "trained"), default=None,
                        help="for an adapter of a 4- or 8-bit base. source: fold it into the 16-bit model that the base was packed from; "
                        "trained: into the numbers that it was trained on (default: source, and trained for init: loftq)")  # fmt: skip
    parser.add_argument("--into", metavar="B", default=None,
                        help="write it packed: nf4, fp4, int8, fp8, with options as for --base (left out: 16 or 32 bits)")  # fmt: skip
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default=None,
                        help="with --into. stochastic: to one of the two neighbouring levels by chance, right in the mean; each "
                        "weight is further off (default: nearest)")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", default=None, help="of the draws of --rounding stochastic (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model's folder that OUT names")
    parser.add_argument("--untie", action="store_true", help="merge into a weight that two layers share by giving each its own")


def run(args: argparse.Namespace) -> int:
    adapter, target = Given("adapter", Path(args.adapter).expanduser()), Path(args.output).expanduser()
    base = base_of(args.model, [adapter])
    check_target(target, args.overwrite, adapter.folder, base)
    check_device(args.device)
    with step("loading libraries", tell=False):
        import torch

        import weft.adapters
        from weft.cli.quantize import write
        from weft.core import WeftError
        from weft.quant import BASES, Quantised, quantise_, unpack_

    trained = _trained_in(base, adapter.folder, args.base)
    into = _packing(args)
    lossy = _began_with_the_loss(adapter.folder)
    args.onto = args.onto or ("trained" if trained and lossy else "source")
    _check_formats(base, trained, into, args, lossy)
    working, wanted = _formats(base, args, trained)
    model, tokenizer = load(base, [adapter], trained if trained and args.onto == "trained" else working, args.device)
    for layer in model.modules():
        if isinstance(layer, Quantised):  # it becomes numbers that are not rounded to less than what is written
            layer.dtype = torch.promote_types(layer.dtype, BASES[wanted])
    with step("asking the adapter"):
        ids = probe(tokenizer, model)
        before = logits(model, ids)
    with step("comparing"):
        rows = changes(model, BASES[wanted], trained if args.onto == "source" else None, into)
    with step("merging"):
        try:
            weft.adapters.merge(model, keep=False, untie=args.untie)
        except WeftError as e:
            raise WeftError(str(e).replace("untie=True", "--untie")) from None
        for layer in model.modules():  # the adapter left these alone
            if isinstance(layer, Quantised):
                unpack_(layer)
        cast(model, BASES[wanted])
    with step("asking the merged model"):
        after = logits(cast(model, BASES[working]), ids)
        cast(model, BASES[wanted])  # back again: what was rounded once stays as it is
    if into is not None:
        with step("packing"):
            quantise_(model, into[0], **into[1])
            after = logits(cast(model, BASES[working]), ids)
    with step(f"writing {target}"), no_bars(), staged(target) as folder:
        if into is not None:
            write(model, folder, base)
        else:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    same = (before.argmax(-1) == after.argmax(-1)).sum().item()
    size = sum(p.stat().st_size for p in target.iterdir())
    console = out()
    if trained or into:
        _table(rows)
    console.print(f"merged into {target}: {size / 1e6:,.1f} MB in {into[0] if into else wanted}", markup=False)
    console.print(
        f"largest logit difference to the adapter: {(before - after).abs().max():.2g}, of logits up to {before.abs().max():.3g}; "
        f"the likeliest token is the same in {same} of {ids.shape[1]} places",
        markup=False,
    )
    if not torch.isfinite(after).all():
        say(f"the merged model gives numbers that are not finite: {wanted} cannot hold its weights; merge again with --dtype bf16 or fp32")
    return 0


def _trained_in(base: str, folder: Path, given: str) -> str | None:
    """The packed format that the adapter was trained on, by --base, its recipe or the base's own file; None for a plain one."""
    from weft.quant import FORMATS, parse_base

    for text in (given, str(settings_of(folder).get("base", "auto"))):
        if parse_base(text)[0] in FORMATS:
            return text
    return "auto" if packed_file(base) else None


def _began_with_the_loss(folder: Path) -> bool:
    """Whether the adapter's recipe let it begin as what packing lost (LoftQ): the 16-bit source has that already."""
    method = settings_of(folder).get("method")
    return isinstance(method, dict) and method.get("init") == "loftq"


def _packing(args: argparse.Namespace) -> tuple[str, dict[str, Any]] | None:
    """The packed format to write and its options, None without --into."""
    from weft.quant import BASES, format_of, parse_base, writable

    given = {k: v for k in ("rounding", "seed") if (v := getattr(args, k)) is not None}
    if args.into is None:
        if given:
            raise UsageError(f"--{next(iter(given))} is about packing: name the format to write by --into nf4, or leave it out")
        return None
    named = args.into.partition(":")[0]
    if named in BASES:
        raise UsageError(f"--into {args.into} is no packed format: write --dtype {args.into} for a plain model, or --into nf4")
    if named not in writable():
        raise UsageError(f"--into {args.into} is no format that a merged model can be packed in: there are {', '.join(writable())}")
    kind, options = parse_base(args.into)
    options = format_of(kind).checked(**options | given)
    if "seed" in given and options["rounding"] == "nearest":
        raise UsageError("--seed is for --rounding stochastic: rounding to the nearest level draws nothing")
    return kind, options


def _check_formats(base: str, trained: str | None, into: tuple[str, Any] | None, args: argparse.Namespace, lossy: bool) -> None:
    if args.onto == "trained" and trained is None:
        raise UsageError("--onto trained: this adapter was trained on a plain base; leave it out, or name the packed one by --base nf4")
    if args.onto == "source" and trained and lossy:
        raise UsageError(
            "--onto source: this adapter began as what packing lost (init: loftq), which the 16-bit model has already, so that it would be "
            "there twice: merge it into the packed base that it was made for by --onto trained"
        )
    if args.onto == "source" and packed_file(base):
        raise UsageError(
            f"{base} is packed, so the 16-bit weights that it was made from are not in it: give them by --model, or merge into the numbers "
            "that the adapter was trained on by --onto trained"
        )
    if into is not None and args.onto == "trained" and into[1]["rounding"] == "nearest":
        raise UsageError(
            "--into with --onto trained would unpack, add and pack again, and rounding takes nearly all of a usual adapter away (it keeps "
            f"1.5% of one of 1% of the weights' size). {'W' if lossy else 'Merge into the 16-bit source (--onto source), w'}rite 16 bits "
            "(without --into), or round by chance (--rounding stochastic), which keeps the adapter in the mean"
        )


def changes(model: Any, dtype: Any, trained: str | None, into: tuple[str, Any] | None) -> list[tuple[str, float, float, float | None]]:
    """For each adapted weight, before merging: its path, ‖BA‖ / ‖W‖, the kept fraction, and |W16 - W4| / |W16| where W4 was trained on.

    BA stands for the change that the adapter makes, whatever its method. The kept fraction is that of the change which is still there in
    what is written: ⟨written - W, BA⟩ / ⟨BA, BA⟩; for one packed to the nearest level W is packed too, since its own error is no change.
    One rounded by chance is what will be written, to the bit, and has no such error in the mean.
    """
    import torch

    from weft.core import masters, sites, slot_of
    from weft.quant import FORMATS, dense, parse_base, roundtrip

    before = parse_base(trained) if trained else None
    found: list[tuple[str, float, float, float | None]] = []
    with torch.inference_mode():
        for path, site in sites(model).items():
            names = [n for n in site.active if n in slot_of(site)]
            if len(names) != 1 or slot_of(site)[names[0]].unmergeable(site) or not slot_of(site)[names[0]].method.mergeable:
                continue
            value = masters(slot_of(site)[names[0]]).merged(site).get("weight")
            if value is None or value.dim() != 2:
                continue
            own: Any = dense(site).float()
            change = value.float() - own
            if into is None:
                left = value.to(dtype).float() - own
            else:
                packed = partial(roundtrip, base=into[0], name=f"{path}.weight", **into[1])
                left = packed(value.to(dtype)).float() - (packed(own.to(dtype)).float() if into[1]["rounding"] == "nearest" else own)
            size = own.norm().clamp(min=1e-30)
            kept = (left * change).sum() / change.square().sum().clamp(min=1e-30)
            off = None
            if before is not None and before[0] in FORMATS:
                off = float((roundtrip(own, before[0], **before[1]) - own).norm() / size)
            found.append((path, float(change.norm() / size), float(kept), off))
    return found


def _table(rows: list[tuple[str, float, float, float | None]]) -> None:
    from rich.table import Table

    table = Table()
    for title in ("layer", "‖BA‖ / ‖W‖", "kept", "|W16 - W4| / |W|"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    for path, size, kept, off in rows:
        table.add_row(path, f"{size:.4f}", f"{kept:.3f}", "-" if off is None else f"{off:.4f}")
    out().print(table)


def _formats(base: str, args: argparse.Namespace, trained: str | None) -> tuple[str, str]:
    """(format to load, merge and compare in, format to write). Each weight is rounded once, from what is stored to what is written.

    On a CPU the work is done in fp32, as `weft generate` does there; on an accelerator in 16 bits where that loses nothing.
    """
    import torch
    from transformers import AutoConfig

    from weft.models import resolve
    from weft.quant import BASES

    source = resolve(base)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    except (OSError, ValueError):
        config = None  # loading it will tell what is wrong with it
    stored = next((name for name, dtype in BASES.items() if dtype == getattr(config, "dtype", None)), "fp32")
    if args.base in BASES:
        stored = args.base
    wanted = stored if args.dtype == "auto" else args.dtype
    cpu = args.device == "cpu" or (args.device is None and not torch.cuda.is_available())
    return (stored if stored == wanted and (args.base in BASES or not cpu) else "fp32"), wanted


def cast(model: Any, dtype: Any) -> Any:
    """Change the parameters' format, and nothing else: a buffer such as the rotary frequencies keeps its own. Returns the model."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    return model


def probe(tokenizer: Any, model: Any) -> Any:
    """(1, T) ids of a few lines of text, the same for every merge, cut to the places that the model has."""
    import torch

    from weft.models import room

    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"][:, : room(model)]
    return ids.to(next(model.parameters()).device).clamp(max=model.get_input_embeddings().num_embeddings - 1).to(torch.int64)


def logits(model: Any, ids: Any) -> Any:
    """(T, vocabulary) in fp32, on the CPU."""
    import torch

    with torch.inference_mode():
        return model(input_ids=ids).logits[0].float().cpu()


def check_target(target: Path, overwrite: bool, *sources: str | Path, what: str = "the merged model") -> None:
    """Raise UsageError unless a model may be written to this folder."""
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file: choose a folder for {what}")
    for source in map(Path, sources):
        if source.exists() and (source.resolve() == target.resolve() or target.resolve() in source.resolve().parents):
            made = "merged" if "merged" in what else "quantised"
            raise UsageError(f"{target} holds what is to be {made} ({source}): choose another folder for {what}")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{target} is not empty: choose another folder, or replace what is there with --overwrite")
    if not (target / "config.json").is_file() or any(p.is_dir() for p in target.iterdir()):
        raise UsageError(f"{target} holds more than a model, so --overwrite would take more than a model away: choose another folder")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end of the block. On an error it is gone and `target` is as it was."""
    from weft.core import WeftError

    folder, old = (target.resolve().with_name(f".{target.resolve().name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        folder.mkdir(parents=True)
        yield folder
        for path in folder.iterdir():
            path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files that only their owner can read
            with path.open("rb") as f:
                os.fsync(f.fileno())
        if target.exists():
            target.resolve().rename(old)
        folder.rename(target.resolve())
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as e:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target.resolve())
        if isinstance(e, OSError) or type(e).__name__ == "SafetensorError":  # safetensors reports a full disk by its own exception
            why = getattr(e, "strerror", None) or str(e)
            raise WeftError(f"could not write {target}: {why}. Nothing was changed; make room, or choose another folder") from e
        raise
