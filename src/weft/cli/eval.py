"""`weft eval`: what a base and its adapters know about some rows."""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from weft.cli.common import Given, adapters_given, base_of, load, model_arguments, out, settings_of, step
from weft.cli.main import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Settings of the data that are left out are those of the first adapter's recipe.\n\n"
        "  weft eval --adapter adapter --data held-out.jsonl --exact-match"
    )
    model_arguments(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="FILE", action="append", help="a path, a glob, or hf:org/name[split]; may be given several times")
    group.add_argument("--rows", type=int, metavar="N", help="at most so many rows, evenly spaced (default: all)")
    group.add_argument("--format", choices=("auto", "messages", "sharegpt", "prompt", "alpaca", "text"), help="how rows are written")
    group.add_argument("--loss-on", choices=("answer", "last", "all"), help="which tokens are counted")
    group.add_argument("--template", choices=("auto", "chat", "plain"), help="whether rows go through the tokenizer's chat template")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens of a row; what is beyond is cut off")
    group.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens of a batch (default: 4096)")
    group.add_argument("--no-packing", action="store_true", help="pad rows instead of laying them end to end")
    group = parser.add_argument_group("figures")
    group.add_argument("--exact-match", action="store_true", help="let the model answer, and count the answers that equal the row's")
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    group.add_argument("--no-base", action="store_true", help="leave the bare base out")
    group.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    adapters = adapters_given(args.adapter)
    base = base_of(args.model, adapters)
    for flag, value in (("--rows", args.rows), ("--tokens", args.tokens), ("--max-tokens", args.max_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value} must be at least 1")
    if args.no_base and not adapters:
        raise UsageError("--no-base leaves nothing to look at: give an --adapter")
    with step("loading libraries", tell=False):
        import weft.adapters
        from weft.data import Batches, load_rows, prepare
        from weft.models import attention, room
        from weft.train import exact_match, mean_loss
        from weft.train.evaluate import check_lengths
        from weft.train.single import spread
    config = data_config(args, adapters)
    with step("reading rows"):
        rows = spread(load_rows(config.train, config.format), args.rows)
    model, tokenizer = load(base, adapters, args.base, args.device)
    names: list[str | None] = [*([] if args.no_base else [None]), *(g.name for g in adapters)]
    prepared = prepare(rows, tokenizer, config, places=room(model))
    if warning := check_lengths(model, prepared.examples, rows, args.tokens, "--max-length", "--tokens"):
        warnings.warn(warning, stacklevel=1)
    batches = Batches(prepared.examples, args.tokens, bool(config.packing) and attention.use(model), 0).epoch(0)
    figures: list[dict[str, Any]] = []
    for name in names:
        weft.adapters.use(model, name)
        began = time.perf_counter()
        with _bar(f"loss of {name or 'base'}", len(batches)) as tick:
            loss = mean_loss(model, batches, tick)
        figure = {"name": name or "base", "loss": loss, "perplexity": _exp(loss)}
        if args.exact_match:
            with step(f"answers of {name or 'base'}"):
                figure["exact_match"] = exact_match(model, tokenizer, rows, args.max_tokens, config=config).share
        figures.append({**figure, "seconds": round(time.perf_counter() - began, 3)})
    if args.json:
        targets = sum(int(e.bears.sum()) for e in prepared.examples)
        told = {"model": base, "data": config.train, "rows": len(rows), "targets": targets, "figures": figures}
        print(json.dumps(told, ensure_ascii=False))
    else:
        _table(figures, len(rows), args.exact_match)
    return 0


def data_config(args: argparse.Namespace, adapters: Sequence[Given]) -> Any:
    """What the flags say about data, over what the first adapter's recipe says, over the defaults."""
    from weft.data import DataConfig

    recipe = (settings_of(adapters[0].folder).get("data") or {}) if adapters else {}
    source = args.data or recipe.get("eval")
    if not source:
        raise UsageError("which rows? give --data held-out.jsonl")
    known = {f.name for f in fields(DataConfig)} - {"train", "eval", "eval_split"}
    values = {k: v for k, v in recipe.items() if k in known}
    said = {k: getattr(args, k) for k in ("format", "loss_on", "template", "max_length")}
    said["format"] = args.format or ("auto" if args.data else None)
    values |= {k: v for k, v in said.items() if v is not None} | ({"packing": False} if args.no_packing else {})
    return DataConfig(train=source, **values)


def _exp(loss: float) -> float:
    """Perplexity; infinite where it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def _bar(what: str, total: int) -> Any:
    """A with-block whose value is called once a batch, and which shows how far it is."""
    from contextlib import contextmanager

    from rich.progress import Progress

    from weft.cli.common import err

    @contextmanager
    def bar() -> Any:
        with Progress(console=err(), transient=True, disable=not err().is_terminal) as shown:
            task = shown.add_task(what, total=total)
            yield lambda: shown.advance(task)

    return bar()


def _table(figures: Sequence[dict[str, Any]], rows: int, matched: bool) -> None:
    from rich.table import Table

    table = Table(title=f"{rows:,} rows", title_justify="left")
    table.add_column("")
    for title in ("loss / token", "perplexity", *(["exact match"] if matched else []), "seconds"):
        table.add_column(title, justify="right")
    for f in figures:
        cells = [f"{f['loss']:.4f}", f"{f['perplexity']:,.4g}", *([f"{f['exact_match']:.1%}"] if matched else []), f"{f['seconds']:.1f}"]
        table.add_row(f["name"], *cells)
    out().print(table)
