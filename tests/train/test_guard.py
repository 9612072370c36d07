"""What stops a run: wrong losses, silent layers, signals, a full disk. Signals and disks are real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest
import tiny_run
import torch

import weft
from weft.core import WeftError
from weft.train import Diverged, TrainConfig
from weft.train.checkpoint import State
from weft.train.guard import LossGuard


def feed(guard: LossGuard, state: State, losses: list[float]) -> None:
    for i, loss in enumerate(losses):
        guard.watch(i, torch.tensor(loss), torch.tensor(1.0))
        guard.check(state)


def test_spike_stops_only_when_it_stays():
    guard, state = LossGuard(TrainConfig(spike=3.0, spike_steps=4)), State()
    feed(guard, state, [1.0] * 20 + [9.0] * 3 + [1.0] * 5 + [9.0] * 3 + [1.0])
    with pytest.raises(Diverged, match="for 4 steps the loss was over 3 times its running median"):
        feed(guard, state, [9.0] * 4)


def test_small_losses_may_triple():
    feed(LossGuard(TrainConfig(spike_steps=2)), State(), [0.01] * 20 + [0.5] * 10)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_not_finite_stops_at_once(loss, norm):
    guard = LossGuard(TrainConfig(spike=0))
    guard.watch(7, torch.tensor(loss), torch.tensor(norm))
    with pytest.raises(Diverged, match="stopped at step 7"):
        guard.check(State())


def test_a_run_that_diverges_names_its_last_checkpoint(tmp_path):
    """A learning rate of 1e30 overflows within a few steps."""
    model = tiny_run.model()
    wild = {"train__lr": 1e30, "train__warmup": 6, "train__clip": 0, "eval__start": False}
    recipe = tiny_run.recipe(tmp_path, train__steps=50, train__save_every=1, **wild)
    with pytest.raises(Diverged, match=r"Lower train\.lr") as caught:
        weft.fit(model, recipe, tokenizer=tiny_run.tokenizer())
    kept = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert (str(kept[-1]) in str(caught.value)) if kept else "No checkpoint" in str(caught.value)
    assert not weft.adapters.names(model)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_silent_layers_are_named(tmp_path):
    model = tiny_run.model()
    model.model.spare = torch.nn.Linear(4, 4)  # nobody calls it
    with pytest.raises(WeftError, match=r"2 of \d+ adapter parameters got no gradient in the first step: model\.spare\.A, model\.spare\.B"):
        weft.fit(model, tiny_run.recipe(tmp_path), tokenizer=tiny_run.tokenizer())
    fixed = tiny_run.recipe(tmp_path, method__exclude=["spare"], output=str(tmp_path / "fixed"))
    assert weft.fit(model, fixed, tokenizer=tiny_run.tokenizer()).steps == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_a_checkpoint_and_resumes_exactly(tmp_path, number):
    tokenizer = tiny_run.tokenizer()
    calm = tiny_run.recipe(tmp_path, output=str(tmp_path / "calm"))
    weft.fit(tiny_run.model(), calm, tokenizer=tokenizer)

    def at_seven(event: dict) -> None:
        if event["event"] == "step" and event["step"] == 7:
            os.kill(os.getpid(), number)

    recipe = tiny_run.recipe(tmp_path)
    handler = signal.getsignal(number)
    with pytest.raises(weft.train.Interrupted, match="give the same command again") as caught:
        weft.fit(tiny_run.model(), recipe, tokenizer=tokenizer, on_event=at_seven)
    assert caught.value.code == 128 + number and caught.value.checkpoint.name == "step-00000007"
    assert signal.getsignal(number) is handler
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    weft.fit(tiny_run.model(), recipe, tokenizer=tokenizer)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (tmp_path / "calm" / "adapter_model.safetensors").read_bytes()


def test_signal_while_evaluating(tmp_path):
    """The evaluation is broken off, and done again when the run goes on."""

    def at_start(event: dict) -> None:
        if event["event"] == "at" and event["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(weft.train.Interrupted):
        weft.fit(tiny_run.model(), tiny_run.recipe(tmp_path), tokenizer=tiny_run.tokenizer(), on_event=at_start)
    result = weft.fit(tiny_run.model(), tiny_run.recipe(tmp_path), tokenizer=tiny_run.tokenizer())
    assert [line["step"] for line in result.history if "eval_loss" in line] == [0, 10, 20]


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The system itself refuses to write past a size (RLIMIT_FSIZE), as a full disk would: at once, or in the middle of a file."""
    overrides = {"train__save_every": 4, "train__steps": 4000}
    first = tiny_run.start(tmp_path, overrides)
    checkpoints = tmp_path / "out" / "checkpoints"
    until = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < until:
        time.sleep(0.01)
    first.kill()
    first.join()
    kept = {p: p.read_bytes() for p in sorted(checkpoints.glob("step-*/*"))}
    newest = sorted(checkpoints.glob("step-*"))[-1]

    second = tiny_run.start(tmp_path, overrides, limit=max(map(len, kept.values())) // 2)
    second.join()
    assert second.exitcode == 2
    told = (tmp_path / "error.txt").read_text()
    assert "could not be written: File too large. What was saved before is untouched" in told
    assert all(p.read_bytes() == old for p, old in kept.items() if p.parent == newest)
    assert sorted(checkpoints.glob("step-*"))[-1] == newest and not list(checkpoints.glob(".weft-tmp-*"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "unfinished"


def test_disk_fills_up_and_is_freed(tmp_path):
    """A file system of 2 MB that is really full. Once there is room, the same run goes on to the bytes of one that never stopped."""
    tokenizer, disk = tiny_run.tokenizer(), tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs the rights of root")
    try:
        weft.fit(tiny_run.model(), tiny_run.recipe(tmp_path), tokenizer=tokenizer)
        recipe = tiny_run.recipe(tmp_path, output=str(disk / "out"), train__save_every=5)

        def fill(event: dict) -> None:
            if event["event"] == "at" and event["step"] == 12:
                with suppress(OSError), (disk / "filler").open("wb", buffering=0) as f:
                    while f.write(b"x" * 4096):
                        pass

        with pytest.raises(WeftError, match=r"No space left on device\. What was saved before is untouched"):
            weft.fit(tiny_run.model(), recipe, tokenizer=tokenizer, on_event=fill)
        kept = sorted(p.name for p in (disk / "out" / "checkpoints").iterdir())
        assert kept == ["step-00000005", "step-00000010"]
        (disk / "filler").unlink()
        weft.fit(tiny_run.model(), recipe, tokenizer=tokenizer)
        names = [tmp_path / "out" / "adapter_model.safetensors", disk / "out" / "adapter_model.safetensors"]
        assert names[0].read_bytes() == names[1].read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)
