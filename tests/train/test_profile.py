"""`train.profile`: a trace and a table of a few steps, whatever becomes of the run. A fault here ends a process, so runs have their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

import weft
from weft.train import Interrupted

RUNS = """
import sys
from pathlib import Path
import tiny_run, weft
folder, steps, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
recipes = [
    tiny_run.recipe(folder, name=n, output=str(folder / n), train__steps=steps, train__profile=True, data__eval=None,
                    train__progress="lines")  # fmt: skip
    for n in names
]
weft.fit_together(tiny_run.model(), recipes, tokenizer=tiny_run.tokenizer())
"""


def profiled(folder: Path, steps: int, names: str) -> str:
    """What such a run of its own process says; it ends as it should."""
    places = [str(Path(__file__).parent), str(Path(weft.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(folder), str(steps), names], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.parametrize("steps", [3, 6])
def test_what_there_is_of_three_steps_is_written(tmp_path, steps):
    said = profiled(tmp_path, steps, "a")
    assert "where a step's time goes" in said and "profiler_start" not in said
    assert (tmp_path / "a" / "profile" / "trace.json").stat().st_size > 1000
    assert "aten::" in (tmp_path / "a" / "profile" / "table.txt").read_text()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_too_short_for_one_says_so(tmp_path, steps):
    assert f"there is no profile: it is of steps 3 to 5, and this run took {steps}" in profiled(tmp_path, steps, "a")
    assert not (tmp_path / "a" / "profile").exists()


def test_runs_at_once_have_one_profile(tmp_path):
    assert profiled(tmp_path, 6, "ab").count("where a step's time goes") == 1


def test_a_stopped_run_is_profiled_when_it_goes_on(tmp_path):
    def stop(event):
        if event["event"] == "at" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = tiny_run.recipe(tmp_path, train__steps=9, train__profile=True)
    with pytest.raises(Interrupted):
        weft.fit(tiny_run.model(), recipe, tokenizer=tiny_run.tokenizer(), on_event=stop)
    weft.fit(tiny_run.model(), recipe, tokenizer=tiny_run.tokenizer())
    assert (tmp_path / "out" / "profile" / "table.txt").is_file()
