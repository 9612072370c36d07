"""What every benchmark here shares: timing, and results as JSON with machine, versions, date and commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def timed(work: Callable[[], Any], repeat: int = 7, before: Callable[[], Any] | None = None, warm: int = 1) -> float:
    """Median seconds of `work`; `before` runs untimed ahead of each repetition."""
    times = []
    for i in range(repeat + warm):
        if before is not None:
            before()
        start = time.perf_counter()
        work()
        if i >= warm:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def interleaved(works: dict[str, Callable[[], Any]], repeat: int = 15, warm: int = 2) -> dict[str, float]:
    """Median seconds of several works, one after another in every round, so that a noisy machine treats them alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeat + warm):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if i >= warm:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def set_inductor() -> dict[str, bool]:
    """Set the compiler's switches that INDUCTOR names, for a trial: INDUCTOR=coordinate_descent_tuning=1,triton.autotune_pointwise=0."""
    pairs = [word.split("=") for word in os.environ.get("INDUCTOR", "").split(",") if word]
    told = {name: value != "0" for name, value in pairs}
    if told:
        from torch._inductor import config

        config.load_config(told)
    return told


def machine() -> dict[str, Any]:
    """Processor, cores, accelerator."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, "system": platform.system()}


def save(name: str, result: dict[str, Any], packages: tuple[str, ...] = ("torch", "transformers", "peft")) -> Path:
    """Write bench/results/<name>.json (or $OUT/<name>.json) with everything that a reader needs to judge it."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    dirty = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = (
        git.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
        if git.returncode == 0
        else os.environ.get("WEFT_COMMIT", "unknown")
    )
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    whole = {"date": stamp, "commit": commit, "machine": machine(), "versions": versions, **result}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path
