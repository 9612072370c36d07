"""`weft demo` from end to end, with a few steps of training instead of hundreds."""

from __future__ import annotations

from pathlib import Path

import pytest

import weft.cli.demo_runs as runs
import weft.cli.demo_show as show
from weft.cli.main import main


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (runs, show):
        monkeypatch.setattr(module, "STEPS", 4)
        monkeypatch.setattr(module, "HELD_OUT", 6)


@pytest.mark.usefixtures("short")
def test_the_demo_shows_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", "--task", "records", "-o", str(folder)]) == 0
    out = capfd.readouterr().out
    for part in ("The base:", "the bare base", "LoRA r=1", "LoRA r=16 *", "full fine-tuning", "learns dates and style", "swapped",
                 "every row its own adapter", "bit for bit what it was", "demo-report.html"):  # fmt: skip
        assert part in " ".join(out.split()) or part in out, part
    rows = [line.split() for line in out.splitlines() if line.startswith(("  LoRA", "LoRA", "full"))]
    trained = {" ".join(words[:2]): words for words in rows}
    assert "5,180,672" in trained["full fine-tuning"], "full fine-tuning starts from the base, not from the adapter before it"
    assert "26,880" in trained["LoRA r=1"] and "215,040" in trained["LoRA r=8"]
    page = (folder / "demo-report.html").read_text(encoding="utf-8")
    assert page.count("plotly-graph-div") >= 3 and "http" not in page.split("</script>")[-1]
    assert {p.name for p in (folder / "adapters").iterdir()} == {"dates", "records", "style"}
    assert main(["demo", "--task", "records", "-o", str(folder)]) == 0, "a second demo replaces the first"


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "holds files of something else" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_committed_sweep_is_whole_and_its_optima_lie_inside_the_grid() -> None:
    sweep = runs.committed_sweep()
    assert sweep["complete"]
    assert sweep["setup"]["steps"] == runs.STEPS and sweep["setup"]["tokens_a_step"] == runs.TOKENS
    for task, method in {(r["task"], r["method"]) for r in sweep["runs"]}:
        best = runs.best(sweep, task, method)
        assert best["interior"], (task, method)
    assert {r["method"] for r in sweep["runs"]} == set(runs.METHODS)
    for task in runs.TASKS:
        assert runs.best(sweep, task, "LoRA r=8")["exact_match"] >= 0.9, f"LoRA r=8 must reach 90 % on {task}"
