"""A base over several processes: FSDP2 shards packed rows, DDP repeats them; both train as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import weft.adapters
from tests.quant.sharded import CASES

ROOT = Path(__file__).parents[2]


def torchrun(*words: str | Path) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    where = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return subprocess.run(run, env=os.environ | {"PYTHONPATH": where, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
    pytest.mark.skipif(torch.__version__ < "2.12", reason="this torch's FSDP2 refuses parameters of whole numbers"),
]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    done = torchrun(Path(__file__).with_name("sharded.py"), tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line for line in done.stdout.splitlines() if line.endswith(" equal")] == [
        f"{how} {base} {type(method).__name__} equal" for how, base, method in CASES
    ]


def test_the_example(tmp_path: Path) -> None:
    done = torchrun(ROOT / "examples" / "sharded.py", 3, tmp_path / "adapter")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step 2: loss" in done.stdout and "on each of 2 processes" in done.stdout
    model = weft.load(weft.load_base("embedded", base="nf4", device="cpu"), tmp_path / "adapter")
    assert any(p.any() for n, p in weft.adapters.trainable(model, "default").items() if n.endswith(".B"))
