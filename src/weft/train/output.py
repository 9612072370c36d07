"""The output folder of a run: who may write into it, what stands in it, and where an interrupted run goes on.

    adapter_config.json, adapter_model.safetensors   the adapter, when the run is finished
    recipe.yaml, run.json                            what was run: every setting; versions, data, times, final figures
    metrics.jsonl, tensorboard/                      the course of the run
    checkpoints/                                     the newest ones, and the best
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

import weft
from weft.core import WeftError
from weft.train import checkpoint
from weft.train.reading import dump_recipe, to_dict
from weft.train.recipe import Recipe

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock
    fcntl = None  # type: ignore[assignment]

OURS = ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints")
LOCK = ".weft-lock"
WHERE_ONLY = ("output", "train.progress", "train.threads")  # settings that do not change what is learned


class Output:
    """The output folder of one run, locked while it is open.

    Nothing in it is touched before `begin`; what stands there is examined first. `undecided` are settings that may still change, and
    are not compared with those of a run that is there.

    Raises:
        WeftError: the folder holds a finished run, a run of another recipe, or files that no run wrote; or another process is writing.
    """

    def __init__(self, recipe: Recipe, resume: str = "auto", overwrite: bool = False, undecided: Sequence[str] = ()) -> None:
        if resume not in ("auto", "never"):
            raise WeftError(f"resume={resume!r}: expected 'auto' (go on with an unfinished run of the same recipe) or 'never'")
        self.folder, self.recipe, self.overwrite = Path(recipe.output), recipe, overwrite
        self.passed_over = (*WHERE_ONLY, *undecided)
        self.checkpoints = self.folder / "checkpoints"
        self.lock: int | None = None
        self.resumed = False if overwrite else self._examine(resume)
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        try:
            TemporaryFile(dir=there).close()  # now, and not when a large base has been loaded
        except OSError as e:
            raise WeftError(f"{self.folder}: cannot be used as output ({e.strerror}). Choose another output.") from e

    def _examine(self, resume: str) -> bool:
        """Whether to go on with the run that is there."""
        if self.folder.exists() and not self.folder.is_dir():
            raise WeftError(f"{self.folder}: a file, not a folder. Choose another output.")
        names = sorted(p.name for p in self.folder.iterdir()) if self.folder.exists() else []
        there = [n for n in names if n != LOCK and not n.startswith(checkpoint.TEMPORARY)]
        if not there:
            return False
        how = "Choose another output, or replace what is there with --overwrite."
        run = self._run()
        if run is None:
            raise WeftError(f"{self.folder}: holds files of something else ({', '.join(there[:5])}). {how}")
        if run.get("status") == "finished":
            raise WeftError(f"{self.folder}: holds a finished run ({run.get('finished', 'no date')}). {how}")
        if differences := self._differences(run):
            raise WeftError(f"{self.folder}: holds an unfinished run of another recipe:\n  " + "\n  ".join(differences) + f"\n{how}")
        if resume == "never":
            raise WeftError(f"{self.folder}: holds an unfinished run of this recipe, and resuming was ruled out. {how}")
        return True

    def latest(self) -> Path | None:
        """The checkpoint from which the run that is there goes on."""
        found = checkpoint.steps(self.checkpoints) if self.resumed else []
        return found[-1] if found else None

    def _run(self) -> dict[str, Any] | None:
        try:
            run = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return run if isinstance(run, dict) else None

    def _differences(self, run: Mapping[str, Any]) -> list[str]:
        there, here = flat(run.get("recipe", {})), flat(to_dict(self.recipe))
        keys = [k for k in [*there, *(k for k in here if k not in there)] if k not in self.passed_over]
        return [f"{k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in keys if there.get(k) != here.get(k)]

    def begin(self, facts: Mapping[str, Any]) -> Path | None:
        """Take the folder, write recipe.yaml and run.json; returns the checkpoint to go on from. `facts` go into run.json.

        Raises WeftError when an unfinished run was made from other data or another base.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            checkpoint.sweep(self.folder)
            if self.resumed:
                return self._continue(facts)
            if self.overwrite:
                for name in OURS:
                    path = self.folder / name
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
        except OSError as e:
            raise WeftError(f"{self.folder}: cannot be used as output ({e.strerror}). Choose another output.") from e
        # run.json first and in one piece: a kill right after it leaves a run that can go on
        self._write({"status": "unfinished", "started": now(), **environment(), **facts, "recipe": to_dict(self.recipe)})
        return self._continue(facts)

    def _continue(self, facts: Mapping[str, Any]) -> Path | None:
        run = self._run() or {}
        for key in ("data", "base"):
            if key in facts and run.get(key) != facts[key]:
                raise WeftError(
                    f"{self.folder}: holds an unfinished run, but the {key} changed since: {run.get(key)} then, {facts[key]} now. "
                    f"Restore the {key}, choose another output, or start again with --overwrite."
                )
        checkpoint.write_text(self.folder / "recipe.yaml", dump_recipe(self.recipe))
        self.checkpoints.mkdir(exist_ok=True)
        checkpoint.sweep(self.checkpoints)
        return self.latest()

    def finish(self, adapter: Any, figures: Mapping[str, Any]) -> int:
        """Save the adapter (`adapter` is called with a folder) and mark the run as finished; returns the adapter's bytes."""
        temp = self.folder / f"{checkpoint.TEMPORARY}adapter"
        with checkpoint.committed(temp / "ready") as inside:
            adapter(inside)
        size = 0
        for file in sorted((temp / "ready").iterdir()):
            size += file.stat().st_size if file.suffix == ".safetensors" else 0
            file.replace(self.folder / file.name)
        checkpoint.flush(self.folder)
        shutil.rmtree(temp)
        self._write({**(self._run() or {}), "status": "finished", "finished": now(), **figures})
        return size

    def note(self, **values: Any) -> None:
        """Add to run.json."""
        self._write({**(self._run() or {}), **values})

    def _write(self, run: Mapping[str, Any]) -> None:
        checkpoint.write_text(self.folder / "run.json", json.dumps(run, indent=2, ensure_ascii=False) + "\n")

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self.lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it with the process, however that ends
        except BlockingIOError as e:
            os.close(self.lock)
            self.lock = None
            raise WeftError(f"{self.folder}: another process is training into this folder. Wait for it, or choose another output.") from e

    def close(self) -> None:
        if self.lock is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            os.close(self.lock)
            self.lock = None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} as {"train.lr": 1}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return out


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def environment() -> dict[str, Any]:
    """What a run stood on: versions, and the commit of the user's working directory where that is a git repository."""
    return {
        "weft": weft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "safetensors")},
        "cuda": torch.version.cuda,
        "git": _git(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> str | None:
    """The commit, with "+changes" when tracked files differ from it; None outside a repository or without git."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return ask("rev-parse", "HEAD") + ("+changes" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
