"""`weft quantize`: a model in 4 or 8 bits, written as a folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.cli.common import check_device, err, no_bars, out, say, step
from weft.cli.main import UsageError
from weft.cli.merge import check_target, staged

SHARD = 4 << 30  # bytes of a file


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "  weft quantize llama-3-8b --base nf4 -o llama-3-8b-nf4"
    parser.add_argument("model", metavar="MODEL", help='a folder, a hub id, or "embedded"')
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the quantised model")
    parser.add_argument("--base", metavar="B", default="nf4",
                        help="nf4, fp4, int8, fp8, or with options nf4:block=128,nested=false,quant_scale=mse (default: nf4)")  # fmt: skip
    parser.add_argument("--device", default=None, metavar="D", help="where to quantise: cpu, cuda, cuda:1; left out: cuda if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace a model's folder that DIR names")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    target = Path(args.output).expanduser()
    check_target(target, args.overwrite, args.model, what="the quantised model")
    check_device(args.device)
    with step("loading libraries", tell=False):
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from weft.models import load_base
        from weft.models.load import skeleton
        from weft.quant import FORMATS, format_of, parse_base, relative_error
    kind, _ = parse_base(args.base)
    if kind not in FORMATS:
        raise UsageError(f"--base {args.base} is no format that quantises: write nf4, fp4, int8 or fp8")
    if getattr(skeleton(args.model).config, "quantization_config", None) is not None:
        say(f"{args.model} is packed already: its numbers are packed once more, and the errors told are against those and not against the "
            "model that it was made from")  # fmt: skip
    errors: dict[str, float] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with no_bars(), Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as shown:
        task = shown.add_task("reading")

        def packed(name: str, value: Any, base: str, tensors: Any) -> None:
            there = value.to(tensors["weight"].device)
            errors[name] = relative_error(there, format_of(base).unpack(tensors, there.shape, there.dtype))
            shown.update(task, description=f"quantised {len(errors)} weights; {name}")

        model = load_base(args.model, args.base, args.device, on_packed=packed)
    with step(f"writing {target}"), no_bars(), staged(target) as folder:
        sizes = write(model, folder, args.model)
    _report(model, target, kind, errors, sizes, args.json)
    return 0


def write(model: Any, folder: Path, source: str) -> dict[str, tuple[int, int]]:
    """The folder of a quantised model: for every packed weight the bytes that it takes in the file, and how many numbers it is."""
    from transformers import AutoTokenizer

    from weft.core import is_linear
    from weft.models import resolve
    from weft.quant import Quantised, QuantLinear, bitsandbytes

    dtype = _dtype(resolve(source))
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Quantised)}
    sizes: dict[str, tuple[int, int]] = {}
    _shards(_tensors(model, layers, dtype, sizes), folder)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    base = next(iter(layers.values())).form.name
    theirs = base in ("nf4", "fp4") and all(type(m) is QuantLinear for m in layers.values())  # what transformers + bitsandbytes can load
    some = next(iter(layers.values()))
    first = some.tensors(next(iter(some.shapes)))
    plain = [path for path, m in model.named_modules() if is_linear(m) and path not in layers]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": {"quant_method": "weft", "format": base}}
    if theirs:
        config["quantization_config"] = bitsandbytes.config(base, "nested_absmax" in first, plain, config["dtype"])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    place = resolve(source)
    try:
        AutoTokenizer.from_pretrained(place, local_files_only=Path(place).is_dir()).save_pretrained(folder)
    except (OSError, ValueError, KeyError):
        err().print("no tokenizer beside the model: none was written", style="dim")
    return sizes


def _dtype(source: str) -> Any:
    """That of what is not packed: the checkpoint's own if it has 16 bits, else bf16."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    return torch.float16 if config.get_text_config().dtype == torch.float16 else torch.bfloat16


def _tensors(model: Any, layers: dict[str, Any], dtype: Any, sizes: dict[str, tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """What belongs together in the file, piece by piece; tied weights once."""
    from weft.models import packed

    done: set[int] = set()
    held: set[str] = set()
    for path, module in layers.items():
        for key, shape in module.shapes.items():
            name = f"{path}.{key}"
            made = packed.to_file(name, module.form.name, shape, module.tensors(key), dtype)
            sizes[name] = sum(t.nbytes for t in made.values()), shape.numel()
            held |= {name, *(f"{name}_{beside}" for beside in module.form.beside)}
            yield made
    for name, value in model.state_dict(keep_vars=True).items():
        if name in held or id(value) in done:
            continue
        done.add(id(value))
        yield {name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()}


def _shards(pieces: Iterator[dict[str, Any]], folder: Path) -> None:
    from safetensors.torch import save_file

    files: list[list[str]] = []
    waiting: dict[str, Any] = {}
    total = 0

    def put() -> None:
        save_file(waiting, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(waiting))
        waiting.clear()

    for piece in pieces:
        size = sum(t.nbytes for t in piece.values())
        if waiting and sum(t.nbytes for t in waiting.values()) + size > SHARD:
            put()
        waiting |= piece
        total += size
    put()
    if len(files) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for i, name in enumerate(names):
        (folder / f"{i}.part").rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {k: n for n, keys in zip(names, files, strict=True) for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _report(model: Any, target: Path, kind: str, errors: dict[str, float], sizes: dict[str, tuple[int, int]], as_json: bool) -> None:
    packed, weights = sum(s for s, _ in sizes.values()), sum(n for _, n in sizes.values())
    whole = sum(p.stat().st_size for p in target.glob("*.safetensors"))
    if as_json:
        layers = {k: {"error": errors[k], "bits": 8 * sizes[k][0] / sizes[k][1]} for k in sizes}
        print(json.dumps({"output": str(target), "base": kind, "bits": 8 * packed / weights, "bytes": whole, "layers": layers}))
        return
    from rich.table import Table

    table = Table()
    for title in ("weight", "|W - Ŵ| / |W|", "bits a weight"):
        table.add_column(title, justify="left" if title == "weight" else "right")
    for name, (size, n) in sizes.items():
        table.add_row(name, f"{errors[name]:.4f}", f"{8 * size / n:.3f}")
    out().print(table)
    out().print(
        f"{len(sizes)} weights in {kind}, {8 * packed / weights:.3f} bits a weight; {target}: {whole / 1e6:,.1f} MB in all", markup=False
    )
