"""metrics.jsonl and TensorBoard: one line a logged step or evaluation, none twice and none torn, also after a kill."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from weft.core import WeftError
from weft.step import peak_memory
from weft.train.checkpoint import full_disk


class Metrics:
    """The metrics of a run.

    Args:
        folder: the run's output folder.
        position: bytes of metrics.jsonl that belong to the run so far; what a killed part wrote after its checkpoint is cut off.
        step: steps done so far; TensorBoard drops later ones.
        tensorboard: "on", "off", or "auto": when it is installed.
    """

    def __init__(self, folder: Path, position: int, step: int, tensorboard: str) -> None:
        self.path = folder / "metrics.jsonl"
        self.path.touch()
        os.truncate(self.path, min(position, self.path.stat().st_size))
        self.file = self.path.open("ab", buffering=0)
        self.history = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        self.board = _tensorboard(folder / "tensorboard", step, tensorboard)

    def add(self, values: dict[str, Any]) -> None:
        """One line; `values` holds the step, floats that JSON gives back exactly, and no tensor. Raises WeftError when the disk is full."""
        line = json.dumps(values).encode() + b"\n"
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise full_disk(self.path, e) from e
        self.history.append(values)
        for key, value in values.items() if self.board else ():
            if key != "step" and isinstance(value, int | float):
                self.board.add_scalar(key, value, values["step"])

    def position(self) -> int:
        """Bytes written so far, all of them on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def _tensorboard(folder: Path, step: int, wanted: str) -> Any:
    there = importlib.util.find_spec("tensorboard") is not None
    if wanted == "off" or (wanted == "auto" and not there):
        return None
    if not there:
        raise WeftError('train.tensorboard is "on", but tensorboard is not installed: pip install "weft[tensorboard]"')
    from torch.utils.tensorboard import SummaryWriter  # optional, and a second to import

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def memory(device: torch.device) -> int:
    """Bytes: the peak on a card, or on a CPU what the process holds now (its peak where the system does not tell; 0 on Windows)."""
    if device.type == "cuda":
        return peak_memory(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:  # not Linux
        if importlib.util.find_spec("resource") is None:
            return 0
        resource: Any = import_module("resource")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
