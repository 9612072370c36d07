"""What a user can get wrong: each gives one clear message and exit code 2, and no file is written, changed or half written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Ran, World, snapshot, write_rows
from tests.conftest import gpt2
from weft.cli.main import main

Words = list[object]


@dataclass(frozen=True)
class Case:
    """make: lays out files below a folder and returns the words of the command. says: what the message must contain."""

    name: str
    make: Callable[[World, Path], Words]
    says: tuple[str, ...]


def recipe(text: str) -> Callable[[World, Path], Words]:
    def make(w: World, at: Path) -> Words:
        (at / "recipe.yaml").write_text(f"model: {w.base}\noutput: {at / 'out'}\n{text}")
        return ["train", at / "recipe.yaml"]

    return make


def rows(*lines: object, name: str = "bad.jsonl", more: Words = ()) -> Callable[[World, Path], Words]:
    def make(w: World, at: Path) -> Words:
        return ["train", *w.flags, "--data.train", write_rows(at / name, list(lines)), "--output", at / "out", *more]

    return make


def changed_base(change: Callable[[Path], None]) -> Callable[[World, Path], Words]:
    def make(w: World, at: Path) -> Words:
        shutil.copytree(w.base, at / "base")
        change(at / "base")
        return ["train", *w.flags, "--model", at / "base", "--output", at / "out"]

    return make


def changed_adapter(command: str, change: Callable[[Path], None]) -> Callable[[World, Path], Words]:
    def make(w: World, at: Path) -> Words:
        shutil.copytree(w.a, at / "adapter")
        change(at / "adapter")
        more = {"merge": ["-o", at / "merged"], "eval": ["--data", w.rows], "generate": ["hello"]}[command]
        return [command, "--model", w.base, "--adapter", at / "adapter", *more]

    return make


def config(**values: object) -> Callable[[Path], None]:
    """Change a folder's configuration."""

    def change(folder: Path) -> None:
        path = next(p for name in ("adapter_config.json", "config.json") if (p := folder / name).exists())
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def other_shape(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: (torch.cat([v, v], dim=1) if "q_proj" in k and "lora_A" in k else v) for k, v in tensors.items()}, path)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def renamed_pickle(folder: Path) -> None:
    as_pickle(folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")


def truncated(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])

    return change


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def another_model(folder: Path) -> None:
    """The configuration of a GPT-2 over the weights of a Llama."""
    gpt2().config.save_pretrained(folder)


def output_of_something_else(w: World, at: Path) -> Words:
    (at / "out").mkdir()
    (at / "out" / "thesis.tex").write_text("years of work")
    return ["train", *w.flags, "--output", at / "out"]


def stopped(w: World, at: Path) -> Words:
    shutil.copytree(w.a, at / "run" / "checkpoints" / "step-00000003")
    return ["generate", "--model", w.base, "--adapter", at / "run", "hello"]


def packed(w: World, at: Path) -> Words:
    main(["quantize", str(w.base), "-o", str(at / "packed")])
    return ["extract", at / "packed", "--model", w.base, "-o", at / "new"]


def output_is_a_file(w: World, at: Path) -> Words:
    (at / "out").write_text("a file")
    return ["train", *w.flags, "--output", at / "out"]


def merged_over(*more: str) -> Callable[[World, Path], Words]:
    def make(w: World, at: Path) -> Words:
        (at / "merged").mkdir()
        (at / "merged" / "thesis.tex").write_text("years of work")
        return ["merge", "--model", w.base, "--adapter", w.a, "-o", at / "merged", *more]

    return make


def merged_over_its_base(w: World, at: Path) -> Words:
    shutil.copytree(w.base, at / "base")
    return ["merge", "--model", at / "base", "--adapter", w.a, "-o", at / "base", "--overwrite"]


GOOD = {"prompt": "a", "completion": "b"}
CASES = [
    Case("recipe: unknown key", recipe("data: {train: x.jsonl}\ncolour: red\n"), ("recipe.yaml", "colour: unknown")),
    Case("recipe: misspelt key", recipe("data: {train: x.jsonl}\ntrain: {learning_rate: 1e-3}\nmethod: {rnak: 3}\n"),
         ("train.learning_rate: unknown; did you mean train.lr?", "method.rnak: unknown; did you mean method.rank?")),
    Case("recipe: wrong type", recipe("data: {train: x.jsonl}\ntrain: {steps: many}\n"),
         ("train.steps: expected a whole number", "'many'")),
    Case("recipe: value out of range", recipe("data: {train: x.jsonl}\ntrain: {lr: -1}\n"), ("train.lr: -1", "above 0")),
    Case("recipe: several at once",
         recipe("data: {train: x.jsonl, eval_split: 2}\nmethod: {rank: 0}\ntrain: {lr: -1, steps: many}\nbase: nf5\n"),
         ("data.eval_split", "rank of 0", "train.lr: -1", "train.steps: expected", "base='nf5'")),
    Case("recipe: a part that is no mapping", recipe("data: {train: x.jsonl}\ntrain: fast\neval: {batch: 0}\n"),
         ("train: expected settings (lr,", "eval.batch: 0")),
    Case("recipe: a run without a name", recipe("data: {train: x.jsonl}\nruns: [{name: a}, {seed: 1}]\n"), ("number 2 of 2 has no name",)),
    Case("recipe: runs of one name", recipe("data: {train: x.jsonl}\nruns: [{name: a}, {name: a}]\n"), ("two runs are named a",)),
    Case("recipe: runs that are no list", recipe("data: {train: x.jsonl}\nruns: 3\n"), ("expected a list of settings, and got 3",)),
    Case("recipe: not YAML", recipe("data: [\n"), ("recipe.yaml", "not valid YAML")),
    Case("recipe: missing", lambda w, at: ["train", at / "none.yaml"], ("none.yaml", "cannot be read")),
    Case("recipe: a file of rows", lambda w, at: ["train", w.rows], ("looks like data: write --data.train",)),
    Case("recipe: data missing", recipe("data: {train: none.jsonl}\n"), ("data file not found: none.jsonl",)),
    Case("flag: misspelt", lambda w, at: ["train", *w.flags, "--train.stpes", "3"], ("train.stpes: unknown; did you mean train.steps?",)),
    Case("flag: without its value", lambda w, at: ["train", *w.flags, "--train.lr"], ("--train.lr: needs a value",)),
    Case("flag: a list without brackets", lambda w, at: ["train", *w.flags, "--method.layers_to_transform", "0,1"],
         ("expected a list of whole numbers or null, got '0,1'; a list is written '[0,1]'",)),
    Case("flag: targets without brackets", lambda w, at: ["train", *w.flags, "--output", at / "o", "--method.targets", "q_proj,v_proj"],
         ("matches no module; several are a list: '[q_proj, v_proj]'",)),
    Case("method: a text that is missing",
         lambda w, at: ["train", *w.flags, "--output", at / "o", "--method=PrefixTuning", "--method.init=text"],
         ("error: PrefixTuning: init='text' needs text='…'\n",)),
    Case("flag: of the command, misspelt", lambda w, at: ["train", *w.flags, "--overwite"], ("did you mean --overwrite?",)),
    Case("flag: of another command, misspelt", lambda w, at: ["generate", "hello", "--max-token", "3"], ("did you mean --max-tokens?",)),
    Case("data: broken line", rows(GOOD, GOOD, '{"prompt": "a", "compl', GOOD), ("bad.jsonl:3", "broken JSON")),
    Case("data: empty", rows(), ("bad.jsonl", "empty")),
    Case("data: mixed shapes", rows(GOOD, {"text": "c"}), ("mixes rows of different shapes", "bad.jsonl:1", "bad.jsonl:2")),
    Case("data: unknown shape", rows({"question": "a", "reply": "b"}), ("bad.jsonl:1", "question, reply")),
    Case("data: unknown shape, many rows", rows(*[{"question": "a", "reply": "b"}] * 9, {"q": "a"}),
         ("2 kinds of rows", "bad.jsonl:1 and 8 more like it: no known fields (it has question, reply); rename them", "bad.jsonl:10: no")),
    Case("data: half a character", rows(GOOD, '{"prompt": "a\\ud83d", "completion": "b"}'),
         ("bad.jsonl:2: 'prompt' holds '\\ud83d', which is one half of a character",)),
    Case("data: a row longer than a batch", rows(GOOD, {"prompt": "a" * 100, "completion": "b"}, more=["--train.tokens", 64]),
         ("1 row is longer than a batch, which holds 64 tokens: ", "bad.jsonl:2 has 105 tokens. data.max_length 64 cuts", "train.tokens")),
    Case("data: a row longer than a batch of eval", lambda w, at: ["eval", "--model", w.base, "--data", w.rows, "--tokens", 4],
         ("longer than a batch, which holds 4 tokens", "--max-length 4 cuts", "--tokens")),
    Case("data: answers cut away", rows(GOOD, {"prompt": "a" * 50, "completion": "b"}, more=["--data.max_length", 3]),
         ("data.max_length 3 cuts every answer away", "max_length 5")),
    Case("data: answers empty", rows({"prompt": "a", "completion": " "}), ("nothing to learn",)),
    Case("data: missing", lambda w, at: ["eval", "--model", w.base, "--data", at / "none.jsonl"], ("not found", "none.jsonl")),
    Case("base: no such folder", lambda w, at: ["generate", "--model", at / "none", "hello"], ("none", "is no folder here")),
    Case("base: without weights", changed_base(lambda at: (at / "model.safetensors").unlink()), ("no weights", "*.safetensors")),
    Case("base: only pickles", changed_base(only_pickles), ("only pickles", "pytorch_model.bin", "refuses")),
    Case("base: truncated", changed_base(truncated("model.safetensors")), ("could not be loaded",)),
    Case("base: of another architecture", changed_base(another_model), ("do not belong to its config.json", "missing:")),
    Case("base: of another size", changed_base(config(hidden_size=64)), ("do not belong to its config.json", "of another shape")),
    Case("base: without tokenizer", changed_base(no_tokenizer), ("has no tokenizer",)),
    Case("base: an adapter's folder", lambda w, at: ["generate", "--model", w.a, "hello"], ("it holds an adapter", "--adapter")),
    Case("base: not named", changed_adapter("generate", config(base_model_name_or_path=None)), ("--model",)),
    Case("adapter: missing", lambda w, at: ["generate", "--model", w.base, "--adapter", at / "none", "hello"], ("no such folder",)),
    Case("adapter: of the hub", lambda w, at: ["generate", "--adapter", "org/lora", "x"], ("is fetched by `hf download org/lora ",)),
    Case("adapter: missing, and no base", lambda w, at: ["generate", "--adapter", at / "none", "hello"], ("no such folder",)),
    Case("adapter: of a run that was stopped", stopped, ("holds no adapter", "there is one in checkpoints/step-00000003")),
    Case("adapter: of another shape", changed_adapter("generate", other_shape), ("of another shape", "q_proj")),
    Case("adapter: of another rank", changed_adapter("eval", config(r=8)), ("of another shape", "(4, 32)", "(8, 32)")),
    Case("adapter: other modules", changed_adapter("merge", config(target_modules=["query", "value"])), ("target",)),
    Case("adapter: fewer modules", changed_adapter("generate", config(target_modules=["q_proj"])), ("belonging to nothing here",)),
    Case("adapter: unknown method", changed_adapter("generate", config(peft_type="MAGIC")), ("does not have the method 'MAGIC'",)),
    Case("adapter: truncated", changed_adapter("merge", truncated("adapter_model.safetensors")), ("truncated",)),
    Case("adapter: a pickle", changed_adapter("eval", as_pickle), ("is a pickle", "refuses")),
    Case("adapter: a pickle renamed", changed_adapter("generate", renamed_pickle), ("is a pickle with another name",)),
    Case("adapter: broken configuration", changed_adapter("generate", lambda at: (at / "adapter_config.json").write_text("{")),
         ("adapter_config.json is not valid JSON",)),
    Case("adapter: named twice", lambda w, at: ["generate", "--adapter", w.a, "--adapter", w.a, "hello"], ("two adapters are named 'a'",)),
    Case("output: something else", output_of_something_else, ("thesis.tex", "--overwrite")),
    Case("output: a file", output_is_a_file, ("a file, not a folder",)),
    Case("output: below a file", lambda w, at: ["train", *w.flags, "--model", "none", "--output", w.rows / "o"],
         ("cannot be used as output",)),
    Case("extract: from packed weights", packed, ("is packed, and what packing lost would be taken for training",)),
    Case("extract: from an adapter", lambda w, at: ["extract", w.a, "--model", w.base, "-o", at / "new"], ("holds an adapter already",)),
    Case("merge: two adapters", lambda w, at: ["merge", "--adapter", w.a, "--adapter", w.b, "-o", at / "merged"],
         ("--adapter takes one, and", "weft combine")),
    Case("command: one that is like no other", lambda w, at: ["serve"], ("there is no command 'serve'; weft --help lists",)),
    Case("merge: folder not empty", merged_over(), ("is not empty", "--overwrite")),
    Case("merge: would overwrite more than a model", merged_over("--overwrite"), ("holds more than a model",)),
    Case("merge: onto its base", merged_over_its_base, ("holds what is to be merged",)),
    Case("generate: empty prompt", lambda w, at: ["generate", "--model", w.base, " "], ("the prompt is empty",)),
    Case("generate: no text", lambda w, at: ["generate", "--model", w.base, "a\udcff"], ("the prompt is no UTF-8 text",)),
    Case("generate: too long", lambda w, at: ["generate", "--model", w.base, "x" * 200], ("does not fit", "160")),
    Case("generate: impossible sampling", lambda w, at: ["generate", "--model", w.base, "x", "--top-p", "2"], ("--top-p 2",)),
    Case("generate: prompts missing", lambda w, at: ["generate", "--model", w.base, "--file", at / "none"], ("prompts cannot be read",)),
    Case("recipe: device unknown", lambda w, at: ["train", *w.flags, "--train.device", "gpu"], ("train.device", "gpu")),
    Case("recipe: device not here", lambda w, at: ["train", *w.flags, "--train.device", "cuda:99"], ("train.device", "cuda:99")),
    Case("device: not here", lambda w, at: ["generate", "--model", w.base, "--device", "cuda:99", "x"], ("cuda:99", "torch finds")),
    Case("demo: output is a file", lambda w, at: ["demo", "-o", w.rows], ("is a file: name a folder",)),
    Case("demo: device not here", lambda w, at: ["demo", "-o", at / "demo", "--device", "cuda:99"], ("cuda:99", "torch finds")),
    Case("device: unknown", lambda w, at: ["generate", "--model", w.base, "--device", "gpu", "x"], ("--device gpu", "cuda")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_input(case: Case, world: World, run: Callable[..., Ran], tmp_path: Path) -> None:
    words = case.make(world, tmp_path)
    if "not named" in case.name:
        words = [w for i, w in enumerate(words) if w != "--model" and words[max(i - 1, 0)] != "--model"]
    before, around = snapshot(tmp_path), snapshot(world.base.parent)
    ran = run(*words)
    assert ran.code == 2, ran.err
    assert ran.err.count("error:") == 1 and "Traceback" not in ran.err and ran.out == ""
    for phrase in case.says:
        assert phrase in ran.err
    assert snapshot(tmp_path) == before and snapshot(world.base.parent) == around


def test_an_output_that_holds_another_run(world: World, run: Callable[..., Ran], tmp_path: Path) -> None:
    words = ["train", *world.flags, "--output", tmp_path / "out"]
    assert run(*words).code == 0
    before = snapshot(tmp_path)
    ran = run(*words)
    assert ran.code == 2 and "holds a finished run" in ran.err and "--overwrite" in ran.err
    state = json.loads((tmp_path / "out" / "run.json").read_text())
    assert snapshot(tmp_path) == before
    (tmp_path / "out" / "run.json").write_text(json.dumps(state | {"status": "unfinished"}))
    before = snapshot(tmp_path)
    ran = run(*words, "--method.rank", 3)
    assert ran.code == 2 and "unfinished run of another recipe" in ran.err and "method.rank: 16 there, 3 here" in ran.err
    assert snapshot(tmp_path) == before
    assert run(*words, "--method.rank", 3, "--overwrite").code == 0


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """The system refuses to write past this many bytes of a file, as a full disk does in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_training(world: World, run: Callable[..., Ran], tmp_path: Path) -> None:
    with no_file_over(20_000):
        ran = run("train", *world.flags, "--output", tmp_path / "out")
    assert ran.code == 2 and ran.err.count("error:") == 1, ran.err
    assert not list((tmp_path / "out").glob("adapter_*")), "half an adapter"
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert run("train", *world.flags, "--output", tmp_path / "out").code == 0  # once there is room, the same command goes on


def test_full_disk_while_merging(world: World, run: Callable[..., Ran], tmp_path: Path) -> None:
    words = ["merge", "--adapter", world.a, "--model", world.base, "-o", tmp_path / "merged"]
    with no_file_over(20_000):
        ran = run(*words)
    assert ran.code == 2 and "could not write" in ran.err and "make room" in ran.err, ran.err
    assert snapshot(tmp_path) == {}
    assert run(*words).code == 0
    before = snapshot(tmp_path)
    with no_file_over(20_000):
        assert run(*words, "--overwrite").code == 2
    assert snapshot(tmp_path) == before


def test_ctrl_c_keeps_a_checkpoint(world: World, run: Callable[..., Ran], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["train", *world.flags, "--output", out, "--train.steps", "200", "--train.log_every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "weft", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert said == "" and "interrupted:" in told and "same command again" in told and "Traceback" not in told
    kept = sorted((out / "checkpoints").glob("step-*"))
    assert kept and str(kept[-1]) in told.replace("\n", "")
    assert not (out / "adapter_model.safetensors").exists()
    step = int(kept[-1].name.removeprefix("step-"))
    ran = run(*words)
    assert ran.code == 0 and f"going on after step {step}" in ran.err
    assert (out / "adapter_model.safetensors").exists()
