"""The entry point: help in a blink, nearest matches, exit codes, and what goes where."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import weft
from tests.cli.conftest import Ran, World
from weft.cli import completion
from weft.cli.main import COMMANDS, main, parser_of


def process(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weft", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["trian"]])
def test_nothing_heavy_is_loaded_to_help(words: list[str]) -> None:
    code = (
        "import sys; from weft.cli.main import main; main(sys.argv[1:]); heavy = {'torch', 'transformers', 'jsonargparse', 'yaml'};"
        "sys.exit(len(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "words",
    [["train", "--help"], ["train", "--method=DoRA", "-h"], ["completion", "bash"], ["train", "--data.trian", "x"],
     ["train", "--data.train", "x", "--print-recipe"], ["train", "--data.train", "x", "--train.steps", "0", "--base", "nf9"]],
)  # fmt: skip
def test_of_what_is_heavy_help_and_a_recipe_need_torch_alone(words: list[str]) -> None:
    code = (
        "import sys; from weft.cli.main import main; code = main(sys.argv[1:]); heavy = {'torch._dynamo', 'transformers'};"
        "print(code, *sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    wrong = any("trian" in word or word == "nf9" for word in words)
    assert ran.stderr.splitlines()[-1] == ("2" if wrong else "0") and bool(ran.stdout) != wrong


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_names_every_command(run: Callable[..., Ran], words: tuple[str, ...]) -> None:
    ran = run(*words)
    assert ran.code == 0 and ran.err == "" and all(re.search(rf"^  {name} +\S", ran.out, re.M) for name in COMMANDS)


def test_version(run: Callable[..., Ran]) -> None:
    assert run("--version") == Ran(0, f"weft {weft.__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "said"),
    [("genrate", "did you mean weft generate?"), ("xyz", "weft --help lists the commands"), ("--verison", "no flag '--verison'")],
)
def test_unknown_command(run: Callable[..., Ran], word: str, said: str) -> None:
    ran = run(word)
    assert ran.code == 2 and said in ran.err and ran.out == ""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(run: Callable[..., Ran], command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0 and ran.out.startswith(f"usage: weft {command}") and "--debug" in ran.out
    assert run("help", command).out == ran.out
    parser = parser_of(command)
    assert all(action.help for action in parser._actions if action.option_strings)


def test_the_help_of_training_is_that_of_one_method(run: Callable[..., Ran]) -> None:
    for words, title in (((), "LoRA"), (("--method", "DoRA"), "DoRA"), (("--method=IA3",), "IA3")):
        text = run("train", *words, "--help").out
        assert re.findall(r"^method (\w+):$", text, re.M) == [title]
        assert "weft train --method DoRA --help" in text and ("--method.rank V" in text) == (title != "IA3")
    ran = run("train", "--method", "Dora", "--help")
    assert ran.code == 2 and "did you mean DoRA?" in ran.err


def test_of_all_methods_the_default_one_comes_first() -> None:
    text = parser_of("train").format_help()
    titles = re.findall(r"^method (\w+):$", text, re.M)
    assert titles[0] == "LoRA" and titles[1:] == sorted(titles[1:], key=str.lower)
    rank = " ".join(text.split()).partition("--method.rank V")[2].partition("--method.")[0]
    assert "Also of AdaLoRA: 12" in rank and rank.rstrip().endswith("default: 16]")


def test_a_fault_of_ours(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr(completion, "run", broken)
    ran = run("completion", "bash")
    assert ran.code == 1 and "RuntimeError: a wheel came off" in ran.err and "--debug" in ran.err and "Traceback" not in ran.err
    ran = run("completion", "bash", "--debug")
    assert ran.code == 1 and "Traceback" in ran.err


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line_of_its_own(world: World, run: Callable[..., Ran], tmp_path: Path) -> None:
    words = ["train", *world.flags, "--output", tmp_path / "out", "--method", "ALoRA", "--method.invocation_tokens", "[7, 7, 7, 7]"]
    ran = run(*words)
    assert ran.code == 0 and "\nwarning: no row of the first batch has the invocation tokens (7, 7, 7, 7)" in ran.err
    assert ".py" not in ran.err and "UserWarning" not in ran.err


def test_debug_shows_where_a_mistake_was_found(world: World, run: Callable[..., Ran]) -> None:
    ran = run("generate", "--model", world.a, "hello", "--debug")
    assert ran.code == 2 and "Traceback" in ran.err and "error:" in ran.err


def test_ctrl_c_anywhere(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(completion, "run", pressed)
    assert run("completion", "bash") == Ran(130, "", "interrupted\n")


def test_colours_only_where_they_are_wanted() -> None:
    """A pipe gets none; neither does NO_COLOR, whatever else the surroundings say."""
    assert "\x1b" not in process("trian").stderr
    colour = re.compile(r"\x1b\[[0-9;]*3\d")
    assert colour.search(process("trian", env=os.environ | {"FORCE_COLOR": "1"}).stderr)
    assert not colour.search(process("trian", env=os.environ | {"NO_COLOR": "1", "FORCE_COLOR": "1"}).stderr)


def test_nobody_reads_the_output() -> None:
    code = f"{sys.executable} -m weft train --help; echo code $? >&2"
    done = subprocess.run(["bash", "-c", f"({code}) | true"], capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def complete(script: str, *words: str) -> set[str]:
    """What bash offers for the last word."""
    typed = " ".join(f"'{w}'" for w in words)
    code = f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _weft; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return set(subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_completion_in_bash(run: Callable[..., Ran]) -> None:
    script = run("completion", "bash").out
    assert complete(script, "weft", "ge") == {"generate"}
    assert complete(script, "weft", "") == {*COMMANDS, "--help", "--version"}
    assert complete(script, "weft", "train", "--method.rank_p") == {"--method.rank_pattern"}
    assert complete(script, "weft", "train", "--train.schedule", "") == {"cosine", "linear", "constant"}
    assert complete(script, "weft", "merge", "--dtype", "b") == {"bf16"}
    assert complete(script, "weft", "train", "rec") == set()  # file names: bash's own, by -o default
    assert complete(script, "weft", "completion", "") >= {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_elsewhere(run: Callable[..., Ran], shell: str, tmp_path: Path) -> None:
    script = run("completion", shell).out
    assert all(name in script for name in COMMANDS) and "method.rank" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_called_as_a_module() -> None:
    done = process("--version")
    assert done.returncode == 0 and done.stdout == f"weft {weft.__version__}\n"


def test_main_takes_the_process_own_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["weft", "--version"])
    assert main() == 0 and capsys.readouterr().out.startswith("weft ")
