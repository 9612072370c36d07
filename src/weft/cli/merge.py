"""`weft merge`: an adapter folded into its base, written as a plain transformers folder."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weft.cli.common import Given, base_of, check_device, load, model_arguments, no_bars, out, say, step
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
        from weft.core import WeftError
        from weft.models import BASES

    working, wanted = _formats(base, args)
    model, tokenizer = load(base, [adapter], working, args.device)
    with step("asking the adapter"):
        ids = probe(tokenizer, model)
        before = logits(model, ids)
    with step("merging"):
        try:
            weft.adapters.merge(model, keep=False, untie=args.untie)
        except WeftError as e:
            raise WeftError(str(e).replace("untie=True", "--untie")) from None
        cast(model, BASES[wanted])
    with step("asking the merged model"):
        after = logits(cast(model, BASES[working]), ids)
        cast(model, BASES[wanted])  # back again: what was rounded once stays as it is
    with step(f"writing {target}"), no_bars(), staged(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    same = (before.argmax(-1) == after.argmax(-1)).sum().item()
    size = sum(p.stat().st_size for p in target.iterdir())
    console = out()
    console.print(f"merged into {target}: {size / 1e6:,.1f} MB in {wanted}", markup=False)
    console.print(
        f"largest logit difference to the adapter: {(before - after).abs().max():.2g}, of logits up to {before.abs().max():.3g}; "
        f"the likeliest token is the same in {same} of {ids.shape[1]} places",
        markup=False,
    )
    if not torch.isfinite(after).all():
        say(f"the merged model gives numbers that are not finite: {wanted} cannot hold its weights; merge again with --dtype bf16 or fp32")
    return 0


def _formats(base: str, args: argparse.Namespace) -> tuple[str, str]:
    """(format to load, merge and compare in, format to write). Each weight is rounded once, from what is stored to what is written.

    On a CPU the work is done in fp32, as `weft generate` does there; on an accelerator in 16 bits where that loses nothing.
    """
    import torch
    from transformers import AutoConfig

    from weft.models import BASES, resolve

    source = resolve(base)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    except (OSError, ValueError):
        config = None  # loading it will tell what is wrong with it
    stored = next((name for name, dtype in BASES.items() if dtype == getattr(config, "dtype", None)), "fp32")
    if args.base != "auto":
        stored = args.base
    wanted = stored if args.dtype == "auto" else args.dtype
    cpu = args.device == "cpu" or (args.device is None and not torch.cuda.is_available())
    return (stored if stored == wanted and (args.base != "auto" or not cpu) else "fp32"), wanted


def cast(model: Any, dtype: Any) -> Any:
    """Change the parameters' format, and nothing else: a buffer such as the rotary frequencies keeps its own. Returns the model."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    return model


def probe(tokenizer: Any, model: Any) -> Any:
    """(1, T) ids of a few lines of text, the same for every merge."""
    import torch

    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
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
