"""The front documents: examples run and print what stands there, links lead somewhere, tables and picture are the benchmarks'."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from weft.adapters.formats import FORMATS, NAMES
from weft.cli.completion import flags
from weft.cli.main import main
from weft.core import METHODS

ROOT = Path(__file__).parent.parent
RUN = ["README.md", "CONTRIBUTING.md", "docs/adapters.md", "docs/combining.md", "docs/lora.md", "docs/methods.md", "docs/peft.md",
       "docs/quantised.md"]  # fmt: skip
ALL = [*RUN, "CHANGELOG.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md") if str(p.relative_to(ROOT)) not in RUN)]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def registries() -> Iterator[None]:
    """What an example registers is forgotten afterwards: other tests ask for every method that there is."""
    tables: list[dict] = [METHODS, NAMES, FORMATS]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.mark.parametrize("name", RUN)
@pytest.mark.usefixtures("registries")
def test_the_examples_run_and_print_what_stands_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / name).read_text(encoding="utf-8")
    module = ModuleType("example")  # a module of its own, since a dataclass looks up its module's names
    monkeypatch.setitem(sys.modules, "example", module)
    said, ran = None, 0
    for block in FENCE.finditer(text):
        language, code = block.groups()
        if language == "python":
            line = text.count("\n", 0, block.start()) + 1
            out = StringIO()
            with redirect_stdout(out):
                exec(compile("\n" * line + code, str(ROOT / name), "exec", dont_inherit=True), module.__dict__)
            said, ran = out.getvalue(), ran + 1
        elif language == "text" and said is not None:
            assert said == code, f"{name}: an example prints something else than the text block after it"
            said = None
    assert ran


def test_commands_of_the_readme_are_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = [shlex.split(line)[1:] for line in re.findall(r"^\$ (weft \w.*)$", README, re.M)]
    assert {words[0] for words in found} >= {"train", "eval", "generate", "merge"}
    for command, *words in found:
        assert {w for w in words if w.startswith("-")} <= {flag for names in flags(command) for flag in names[:1]}
        if command == "train":
            assert main(["train", *words, "--print-recipe"]) == 0


@pytest.mark.parametrize("name", ALL)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{name}: {target} is not there"
        if heading:
            titles = re.findall(r"^#+ (.*)$", FENCE.sub("", there.read_text(encoding="utf-8")), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, f"{name}: {target}"


@pytest.mark.parametrize("name", ALL)
def test_headings_tables_and_code_stand_in_paragraphs_of_their_own(name: str) -> None:
    """Where the empty line is missing a renderer runs them into the text before."""
    text = FENCE.sub("```", (ROOT / name).read_text(encoding="utf-8"))
    lines = ["", *text.splitlines(), ""]
    for i, line in enumerate(lines[1:-1], 1):
        if line.startswith("#"):
            assert not lines[i - 1] and not lines[i + 1], f"{name}: {line}"
        if line == "```":
            assert not lines[i - 1] or lines[i - 1].endswith((":", "-->")), f"{name}: code after {lines[i - 1]!r}"
        if line.startswith("|") and not lines[i - 1].startswith("|"):
            assert not lines[i - 1] or lines[i - 1].startswith("<!--"), f"{name}: {line}"
            assert re.fullmatch(r"[|:\- ]+", lines[i + 1]), f"{name}: a table without a head: {line}"


def test_every_method_has_a_place_in_the_guides() -> None:
    guides = "".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("lora", "methods"))
    for name in (name for name, cls in METHODS.items() if cls.__module__.startswith("weft.") and name != "Full"):
        assert f"weft.{name}" in guides, f"no page says what {name} does"


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    records = sorted(p.name for p in folder.glob("*.md") if p.name != "README.md")
    assert re.findall(r"\]\((\d{4}-[^)]*)\)", index) == records
    for name in records:
        assert (folder / name).read_text(encoding="utf-8").startswith(f"# {name[:4]}. ")


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/readme.py, and bench/plots.py as its `plots`."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # it puts bench/ there
    spec = importlib.util.spec_from_file_location("bench_readme", ROOT / "bench" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_tables_and_picture_are_those_of_the_results(readme: ModuleType) -> None:
    assert {name for _, name, _ in readme.BLOCK.findall(README)} == set(readme.BLOCKS)
    assert readme.render(README) == README, "the tables in README.md are not those of the results: python bench/readme.py"
    assert not readme.stale(), "the picture in README.md is not that of the results: python bench/readme.py"


def test_the_picture_shows_every_row_and_failure(readme: ModuleType) -> None:
    def row(row: str, side: str, speed: float, peak: float) -> dict:
        return {"row": row, "side": side, "tokens_per_s": speed, "peak_gb": peak}

    result = {"machine": {"gpu": "a card"}, "rank": 4, "batch": "2 x 8", "rows": [
        row("1B bf16", "peft", 100, 8), row("8B bf16", "peft", 10, 50), row("8B bf16", "unsloth", 20, 60), row("8B bf16", "weft", 15, 40),
        row("3B MoE fp8", "weft", 70, 30), {"row": "1B bf16", "side": "weft", "error": "OutOfMemoryError: too <large>"}]}  # fmt: skip
    svg = readme.plots.draw(result)
    texts = [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    sizes = ["8B", "3B MoE", "1B"]
    assert [t for t in texts if t in sizes] == sizes
    assert {"15", "40.0", "×0.75", "×0.80", "70", "30.0", "weft: out of memory"} <= set(texts)  # each against the best in its own right
    assert "× 0.75 to × 0.75" in readme.plots.alt(result) and "unsloth 20 tokens a second at 60.0 GB" in readme.plots.alt(result)
    assert readme.plots.mark(result) in svg and readme.plots.draw(result) == svg
    result["rows"][0]["peak_gb"] = 9
    assert readme.plots.mark(result) not in svg
    result["rows"][0]["side"] = "another"
    with pytest.raises(ValueError):
        readme.plots.draw(result)
