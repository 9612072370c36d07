"""A run that is killed at any moment and started again ends with the same bytes as one that was never stopped."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import tiny_run
import torch

from weft.train.checkpoint import State, read, write

COURSE = ("step", "loss", "lr", "grad_norm", "tokens", "eval_loss", "train_loss")


def course(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without times and memory; each must be whole."""
    return [{k: v for k, v in json.loads(line).items() if k in COURSE} for line in (out / "metrics.jsonl").read_text().splitlines()]


def newest(out: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(p.name[5:]) for p in out.glob("checkpoints/step-*")), default=0)


def saving(out: Path) -> bool:
    return any(out.glob("checkpoints/.weft-tmp-*")) or any(out.glob(".weft-tmp-*"))


@pytest.mark.parametrize(
    ("kills", "overrides"),
    [
        (9, {"train__steps": 240, "train__save_every": 3, "train__accumulate": 2, "method__lr_ratio": 4.0, "train__eval_every": 40}),
        (5, {"method": "Full", "train__lr": 1e-3, "train__epochs": 40.0, "train__steps": None, "train__save_seconds": 0.05,
             "train__patience": 6, "train__eval_every": 7, "data__packing": False, "train__accumulate": 3}),
        (4, {"method__init": "pissa", "method__train_A": False, "train__steps": 160, "train__save_every": 3, "train__eval_every": 40}),
        (4, {"method__init": "eva", "method__train_A": False, "train__steps": 160, "train__save_every": 3, "train__eval_every": 40}),
        (4, {"method__init": "loftq", "base": "nf4", "train__steps": 160, "train__save_every": 3, "train__eval_every": 40}),
        (4, {"method": "ALoRA", "method__invocation_tokens": [tiny_run.ASSISTANT], "method__rank": 4, "method__dropout": 0.1,
             "train__steps": 160, "train__save_every": 3, "train__eval_every": 40}),
        (6, {"method": "AdaLoRA", "train__steps": 240, "train__save_every": 3, "train__eval_every": 40}),
    ],
    ids=["lora", "full", "pissa", "eva", "loftq", "alora", "adalora"],
)  # fmt: skip
def test_killed_and_resumed_is_never_stopped(tmp_path, kills, overrides, capsys):
    for folder in ("warm", "calm", "wild"):
        (tmp_path / folder).mkdir()
    process = tiny_run.start(tmp_path / "warm", {"train__steps": 1})  # the fork server's imports
    process.join()
    assert process.exitcode == 0
    begun = time.monotonic()
    process = tiny_run.start(tmp_path / "calm", overrides)
    process.join()
    assert process.exitcode == 0
    length = time.monotonic() - begun

    for _ in range(3):  # how far a run gets before a kill is the machine's to say: one that was over too soon is run again
        seed = random.SystemRandom().randrange(10**6)
        rng = random.Random(seed)
        out, survived, in_save, attempts = tmp_path / "wild" / "out", 0, 0, 0
        at: list[int] = []  # the checkpoint that each kill left as the newest
        while survived < kills and attempts < 4 * kills:
            process = tiny_run.start(tmp_path / "wild", overrides)
            attempts += 1
            if attempts % 3 == 0:  # in the middle of a save
                until = time.monotonic() + length
                patience = rng.randint(0, 3)
                while process.is_alive() and time.monotonic() < until and (patience := patience - saving(out)) >= 0:
                    time.sleep(0.0005)
            elif attempts % 3 == 1:  # some time after it got further than the one before it, however long starting takes
                before, until = newest(out), time.monotonic() + 3 * length
                while process.is_alive() and time.monotonic() < until and newest(out) == before:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.5 * length / kills))
            else:
                time.sleep(rng.uniform(0, 1.6 * length / kills))
            if process.is_alive():
                in_save += saving(out)
                process.kill()
                process.join()
                survived += 1
                at.append(newest(out))
            else:
                assert process.exitcode == 0, f"seed {seed}"
                break
        if process.exitcode != 0:
            process = tiny_run.start(tmp_path / "wild", overrides)
            process.join()
            assert process.exitcode == 0, f"seed {seed}"
        if survived >= kills // 2 and len(set(at)) > 1:
            break
        shutil.rmtree(tmp_path / "wild")
        (tmp_path / "wild").mkdir()
    with capsys.disabled():
        print(f" [{survived} kills survived, {in_save} of them during a save, at checkpoints {at}; seed {seed}]", end="")
    assert survived >= kills // 2 and len(set(at)) > 1, "the run was over too soon to be killed"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "calm" / "out" / name).read_bytes(), f"seed {seed}"
    assert course(out) == course(tmp_path / "calm" / "out")
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert not saving(out)


def test_state_and_tensors_come_back(tmp_path):
    place = write(tmp_path, 3, State(step=3, threads=7), {"a": torch.arange(3.0)}, lambda folder: None)
    state, tensors = read(place)
    assert state.threads == 7 and torch.equal(tensors["a"], torch.arange(3.0))
