"""`weft demo`: a small model learns three tasks on this machine, live, through adapters of a few hundred kilobytes."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from weft.cli.common import check_device, out, step
from weft.cli.main import UsageError

LIVE = ("LoRA r=1", "LoRA r=8", "full fine-tuning")  # the other rows come from the committed sweep, unless --all
TASKS = ("dates", "records", "style")  # weft.data.demo.TASKS, named here so that --help loads nothing


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, default="dates", help="the task of the comparison (default: dates)")
    parser.add_argument(
        "--all", action="store_true", help="make the sweep of learning rates here, then train every row of the table (48 runs)"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", default="weft-demo", help="folder for data, adapters and report (default: weft-demo)"
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, cuda:1")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that no demo made")


def run(args: argparse.Namespace) -> int:
    folder = Path(args.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder with -o")
    marker = folder / "demo-report.html"
    if folder.exists() and any(folder.iterdir()) and not marker.exists() and not (folder / ".weft-demo").exists() and not args.overwrite:
        raise UsageError(f"{folder} holds files of something else: name another folder with -o, or pass --overwrite")
    check_device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".weft-demo").touch()
    with step("loading libraries", tell=False):
        from weft.cli.demo_show import Demo
    began = time.perf_counter()
    demo = Demo(folder, args.task, args.device)
    demo.meet()
    sweep = demo.sweep() if args.all else None
    demo.compare(LIVE, sweep)
    demo.others()
    demo.swap()
    demo.mix()
    demo.merge()
    demo.report(time.perf_counter() - began)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return 0


def progress_bar() -> Any:
    """A rich bar for one training run; plain elsewhere than on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.description:18}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=out(), transient=True, disable=not out().is_terminal)
