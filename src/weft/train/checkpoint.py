"""Checkpoints that are there whole or not at all, and hold all that a run needs to go on bit for bit.

A checkpoint is a folder `step-00000120`: the adapter in its own file format (so it can be used as it stands), `state.safetensors` (fp32
masters, both moments, random states) and `state.json` (where the run is). It is written beside its place, flushed to the disk and then
renamed; a kill or a full disk leaves the ones before it as they were.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from weft.core import WeftError

TEMPORARY = ".weft-tmp-"  # what such a name begins with is half written and may be deleted


@dataclass
class State:
    """Where a run is, beside its tensors. Every number survives JSON exactly."""

    step: int = 0  # optimiser steps done
    epoch: int = 0  # the next micro-batch: epoch and index in it
    index: int = 0
    micro: int = 0  # micro-batches done
    tokens: int = 0  # input tokens seen
    seconds: float = 0.0  # spent so far, over all parts of the run
    evaluated: int = -1  # the last step that was evaluated
    best: dict[str, float] = field(default_factory=dict)  # the evaluation with the lowest loss, its step among the figures
    worse: int = 0  # evaluations in a row without a lower loss
    losses: list[float] = field(default_factory=list)  # the guard's window
    spiking: int = 0  # steps in a row above the guard's limit
    metrics: int = 0  # bytes of metrics.jsonl that belong to the run so far
    threads: int = 1
    last: dict[str, float] = field(default_factory=dict)  # the latest evaluation, likewise


def write(folder: Path, step: int, state: State, tensors: dict[str, Tensor], adapter: Any) -> Path:
    """Write the checkpoint of `step` into `folder`. `adapter` is called with a folder and saves the adapter there.

    Raises WeftError when the disk is full or refuses; nothing half written is left, older checkpoints stay as they are.
    """
    place = folder / name(step)
    if place.exists():  # resumed, and stopped again before anything changed
        return place
    with committed(place) as temp:
        adapter(temp)
        (temp / "state.safetensors").write_bytes(safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
        (temp / "state.json").write_text(json.dumps(asdict(state) | {"python": _python_random()}), encoding="utf-8")
    return place


def name(step: float) -> str:
    return f"step-{int(step):08d}"


def read(place: Path) -> tuple[State, dict[str, Tensor]]:
    """The state and tensors of a checkpoint; Python's own random state is set on the way. Raises WeftError when it is damaged."""
    try:
        values = json.loads((place / "state.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load((place / "state.safetensors").read_bytes())
        version, numbers, gauss = values.pop("python")
        random.setstate((version, tuple(numbers), gauss))
        return State(**{f.name: values[f.name] for f in fields(State)}), tensors
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise WeftError(f"{place}: the checkpoint cannot be read ({e}). Delete this folder to go on from the one before it.") from e


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def prune(folder: Path, keep: int, best: float | None) -> None:
    """Delete all but the `keep` newest checkpoints and that of step `best`, and whatever a kill left half written."""
    for old in steps(folder)[:-keep]:
        if best is None or old.name != name(best):
            old.rename(gone := folder / f"{TEMPORARY}{old.name}.old")  # a kill in the middle leaves no half checkpoint that looks whole
            shutil.rmtree(gone)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Delete what a kill left half written in `folder`."""
    for stale in folder.glob(f"{TEMPORARY}*"):
        if stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink()


def random_states(device: torch.device) -> dict[str, Tensor]:
    """torch's random states, each a vector of bytes."""
    cuda = {"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"random.cpu": torch.get_rng_state()} | cuda


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["random.cpu"])
    if device.type == "cuda" and "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"], device)


def _python_random() -> list[Any]:
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]


@contextmanager
def committed(place: Path) -> Iterator[Path]:
    """A folder to write into that becomes `place` when the block ends well, and is deleted when it does not."""
    temp = place.with_name(TEMPORARY + place.name)
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        yield temp
        for path in [*temp.rglob("*"), temp]:
            flush(path)
        temp.rename(place)
        flush(place.parent)
    except BaseException as e:
        shutil.rmtree(temp, ignore_errors=True)
        why = (e.__cause__ or e.__context__) if isinstance(e, WeftError) else e  # weft.save names a file that is gone by now
        if isinstance(why, OSError | SafetensorError):
            raise full_disk(place, why) from e
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temp = path.with_name(TEMPORARY + path.name)
    try:
        temp.write_text(text, encoding="utf-8")
        flush(temp)
        temp.replace(path)
        flush(path.parent)
    except OSError as e:
        temp.unlink(missing_ok=True)
        raise full_disk(path, e) from e


def flush(path: Path) -> None:
    """Have the system put a file or folder on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def full_disk(place: Path, e: Exception) -> WeftError:
    """What the user reads when something could not be written."""
    why = getattr(e, "strerror", None) or str(e)
    return WeftError(
        f"{place} could not be written: {why}. What was saved before is untouched. Free some space (or choose another `output`), "
        "then give the same command again: it goes on from the last checkpoint."
    )
