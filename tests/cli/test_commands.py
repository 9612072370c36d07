"""The commands at work on a tiny base: train, eval, generate, chat, merge."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import weft
from tests.cli.conftest import Ran, World, tokenizer, write_rows
from tests.conftest import jolt
from weft.cli.answering import Sampling, Speaker
from weft.cli.chat import Conversation
from weft.cli.main import parser_of
from weft.core import METHODS
from weft.train import answers, load_recipe, settings

Run = Callable[..., Ran]


# ---- train and eval ---------------------------------------------------------------------------------------------------------


def test_train_then_use_it_without_naming_the_base(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "rank3"
    ran = run("train", *world.flags, "--data.eval", world.rows, "--method.rank", 3, "--output", out)
    assert ran.code == 0, ran.err
    assert "eval loss" in ran.out and "step 2/2" in ran.err and f"weft generate --adapter {out}" in ran.err
    assert yaml.safe_load((out / "recipe.yaml").read_text())["method"]["rank"] == 3
    ran = run("eval", "--adapter", out, "--json", "--exact-match", "--max-tokens", 4)  # base, rows and template: the recipe's
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    final = json.loads((out / "run.json").read_text())["eval_loss"]
    assert [f["name"] for f in told["figures"]] == ["base", "rank3"] and told["rows"] == 24
    assert told["figures"][1]["loss"] == pytest.approx(final, rel=1e-5)
    assert told["figures"][0]["perplexity"] == pytest.approx(torch.tensor(told["figures"][0]["loss"]).exp().item(), rel=1e-5)
    assert run("generate", "--adapter", out, "hello", "--max-tokens", 3).code == 0


def test_eval_table(world: World, run: Run) -> None:
    ran = run("eval", "--model", world.base, "--adapter", world.a, "--adapter", f"{world.b}=other", "--data", world.rows, "--rows", 5)
    assert ran.code == 0, ran.err
    assert "5 rows" in ran.out and "perplexity" in ran.out and all(f"│ {name}" in ran.out for name in ("base", "a", "other"))


def test_eval_does_not_depend_on_packing(world: World, run: Run) -> None:
    words = ["eval", "--model", world.base, "--adapter", world.a, "--data", world.rows, "--json"]
    packed, padded = (json.loads(run(*words, *more).out)["figures"] for more in ([], ["--no-packing"]))
    assert [f["loss"] for f in packed] == pytest.approx([f["loss"] for f in padded], rel=1e-5)


def test_print_recipe(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {train: rows.jsonl}\nmethod: {rank: 4}\n")
    ran = run("train", tmp_path / "r.yaml", "--train.lr=1e-3", "--method.targets", "[q_proj, v_proj]", "--print-recipe")
    assert ran.code == 0, ran.err
    (tmp_path / "whole.yaml").write_text(ran.out)
    recipe = load_recipe(tmp_path / "whole.yaml")
    assert recipe.method == weft.LoRA(rank=4, targets=("q_proj", "v_proj"))
    assert recipe.train.lr == 1e-3 and recipe.data.train == "rows.jsonl"


def test_help_shows_every_setting_with_its_type_default_and_text() -> None:
    shown = parser_of("train").format_help()
    helps = {flag: action.help for action in parser_of("train")._actions for flag in action.option_strings}
    names = [name for name, _, _ in settings()]
    names += [f"method.{f.name}" for method in METHODS.values() for f in fields(method)]
    for name in names:
        text = helps.get(f"--{name}") or ""
        assert re.fullmatch(r"[^\[].*\S \[[^;]+; (default: .+|must be given)\]", text), f"{name}: {text!r}"
        assert f"  --{name} V" in shown


# ---- generate ---------------------------------------------------------------------------------------------------------------


def reference(world: World, adapter: Path | None, prompts: list[str], tokens: int) -> list[str]:
    model, tokenizer = weft.load_base(world.base), weft.load_tokenizer(world.base)
    if adapter:
        weft.load(model, adapter)
    return answers(model, tokenizer, [[{"role": "user", "content": p}] for p in prompts], tokens)


def test_generate_one_prompt(world: World, run: Run) -> None:
    ran = run("generate", "--adapter", world.a, "what is 7", "--max-tokens", 12)
    assert ran.code == 0 and ran.out == reference(world, world.a, ["what is 7"], 12)[0] + "\n"
    ran = run("generate", "--model", world.base, "what is 7", "--max-tokens", 12)
    assert ran.out == reference(world, None, ["what is 7"], 12)[0] + "\n"


def test_generate_reads_a_pipe(world: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is 7\n"))
    assert run("generate", "--adapter", world.a, "--max-tokens", 12).out == reference(world, world.a, ["what is 7"], 12)[0] + "\n"


def test_generate_a_file(world: World, run: Run, tmp_path: Path) -> None:
    prompts = [f"what is {i * i}" for i in range(18)]
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("\n".join(prompts) + "\n\n")
    write_rows(rows, [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "not shown to it"}]} for p in prompts])
    wanted = reference(world, world.b, prompts, 6)
    for file in (text, rows):
        ran = run("generate", "--adapter", world.b, "--file", file, "--json", "--max-tokens", 6)
        told = [json.loads(line) for line in ran.out.splitlines()]
        assert [t["prompt"] for t in told] == prompts and [t["answer"] for t in told] == wanted and told[0]["adapter"] == "b"
    ran = run("generate", "--adapter", world.b, "--file", text, "--max-tokens", 6)
    assert ran.out.startswith(f"> {prompts[0]}\n{wanted[0]}\n")


def test_compare(world: World, run: Run) -> None:
    words = ["generate", "--adapter", world.a, "--adapter", f"{world.b}=other", "--compare", "what is 7", "--max-tokens", 8]
    wanted = {n: reference(world, folder, ["what is 7"], 8)[0] for n, folder in (("base", None), ("a", world.a), ("other", world.b))}
    assert json.loads(run(*words, "--json").out) == {"prompt": "what is 7", "answers": wanted}
    assert run(*words).out == "".join(f"{name}:\n{answer}\n\n" for name, answer in wanted.items())


def test_sampling_follows_the_seed(world: World, run: Run) -> None:
    words = ["generate", "--model", world.base, "hello", "--max-tokens", 20, "--temperature", 2, "--top-p", 0.95, "--seed"]
    first, again, other = (run(*words, seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_the_system_prompt_is_heard(world: World, run: Run) -> None:
    words = ["generate", "--model", world.base, "hello", "--max-tokens", 8]
    assert run(*words).out != run(*words, "--system", "speak in riddles").out


def test_plain_continues_the_prompt(world: World, run: Run) -> None:
    model, tokenizer = weft.load_base(world.base), weft.load_tokenizer(world.base)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=256)[0, ids.shape[1] :]
    ran = run("generate", "--model", world.base, "--plain", "hello", "--max-tokens", 6)
    assert ran.out == tokenizer.decode(made, skip_special_tokens=True) + "\n"


def test_streaming_never_tears_a_character(world: World) -> None:
    """Text is passed on in pieces which add up to the whole; a half of a character waits for the other."""
    speaker = Speaker(weft.load_base(world.base), weft.load_tokenizer(world.base), Sampling(max_tokens=40))
    heard: list[str] = []
    (whole,) = speaker.answer([[{"role": "user", "content": "hello"}]], on_text=lambda row, text: heard.append(text))
    assert len(heard) > 3 and "".join(heard) == whole


# ---- chat -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def conversation(world: World) -> Conversation:
    model = weft.load_base(world.base)
    weft.load(model, world.a, "a")
    weft.load(model, world.b, "b")
    weft.use(model, "a")
    return Conversation(Speaker(model, weft.load_tokenizer(world.base), Sampling(max_tokens=6)), ["a", "b"], None)


def test_chat_keeps_the_history_and_swaps_adapters(conversation: Conversation, capsys: pytest.CaptureFixture[str], world: World) -> None:
    model, tokenizer = conversation.speaker.model, conversation.speaker.tokenizer

    def asked() -> str:
        return answers(model, tokenizer, [conversation.said[:-1]], 6)[0]

    for line, prompt in (("hello", "a> "), ("/adapter b", "b> "), ("and more", "b> "), ("/adapter none", "base> "), ("bye", "base> ")):
        assert conversation.take(line) and conversation.prompt() == prompt
        if not line.startswith("/"):
            assert conversation.said[-1]["content"] == asked()
    assert [m["role"] for m in conversation.said] == ["user", "assistant"] * 3
    capsys.readouterr()
    assert conversation.take("/adapter c") and "no adapter c" in capsys.readouterr().err
    assert conversation.take("/adapter a b") and weft.adapters.active(model) == ("a", "b")
    assert conversation.take("/reset") and conversation.said == []
    assert conversation.take("/compare") and conversation.take("hello")
    said = capsys.readouterr().out
    assert all(f"{name}:\n" in said for name in ("base", "a", "b"))
    assert conversation.take("/help") and "/quit" in capsys.readouterr().err
    assert conversation.take("") and conversation.take("/what") and not conversation.take("/quit")


def test_chat_forgets_the_oldest_when_the_context_is_full(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        conversation.take(f"{i} " + "x" * 60)
    assert "left out" in capsys.readouterr().err
    assert conversation.said[-2]["content"].startswith("3 ") and len(conversation.said) < 8


def test_chat_goes_on_after_a_line_that_does_not_fit(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    conversation.take("hello")
    before = list(conversation.said)
    for line in ("/compare", "x" * 200, "/compare", "x" * 200):
        assert conversation.take(line) and conversation.said == before
    captured = capsys.readouterr()
    assert captured.err.count("does not fit: this model takes 160") == 2 and "left out" not in captured.err and "base:" not in captured.out
    assert conversation.take("and now?") and len(conversation.said) == 4


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
    speaker = conversation.speaker
    speaker.sampling = Sampling(max_tokens=100)
    answer = speaker.answer

    def interrupted(chats: list, names: object = None, on_text: Callable[[int, str], None] = print) -> list[str]:
        def heard(row: int, text: str) -> None:
            on_text(row, text)
            os.kill(os.getpid(), signal.SIGINT)

        return answer(chats, names, heard)

    speaker.answer = interrupted  # type: ignore[method-assign]
    assert conversation.take("hello")
    said = capsys.readouterr()
    assert "(stopped)" in said.err and conversation.said[-1]["content"] and said.out.startswith(conversation.said[-1]["content"])


def test_chat_on_a_terminal(world: World) -> None:
    """A real terminal: the prompt, an answer, a swap, Ctrl-D."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "weft", "generate", "--adapter", world.a, "--adapter", world.b, "--max-tokens", "5"]
    env = os.environ | {"TERM": "dumb", "NO_COLOR": "1"}
    process = subprocess.Popen(list(map(str, words)), stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    heard = b""

    def until(what: bytes) -> None:
        nonlocal heard
        end = time.monotonic() + 90
        while what not in heard:
            assert time.monotonic() < end and process.poll() is None, heard.decode(errors="replace")
            if select.select([ours], [], [], 0.5)[0]:
                heard += os.read(ours, 4096)
        heard = heard.partition(what)[2]

    try:
        until(b"a> ")
        os.write(ours, b"/adapter b\n")
        until(b"b> ")
        os.write(ours, b"hello\n")
        until(b"b> ")
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# ---- merge ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_merge_writes_a_plain_model(world: World, run: Run, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "deep" / "merged"
    ran = run("merge", "--adapter", world.a, "--model", world.base, "-o", out, "--dtype", dtype)
    assert ran.code == 0 and "largest logit difference" in ran.out, ran.err
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {kind}
    assert set(load_file(out / "model.safetensors")) == set(load_file(world.base / "model.safetensors"))
    assert (out / "generation_config.json").exists() and [p.name for p in out.parent.iterdir()] == ["merged"]
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()  # transformers alone
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("what is 7")["input_ids"]])
    model = weft.load(weft.load_base(world.base), world.a)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-4 if dtype == "auto" else 0.3, rtol=0)
    if dtype == "auto":
        assert run("generate", "--model", out, "what is 7", "--max-tokens", 9).out == reference(world, world.a, ["what is 7"], 9)[0] + "\n"


def test_merge_asks_a_model_no_more_than_it_has_positions_for(run: Run, tmp_path: Path) -> None:
    words = tokenizer()
    sizes = dict(vocab_size=len(words), n_embd=32, n_layer=1, n_head=4, n_positions=16)
    model = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=256, bos_token_id=257, eos_token_id=257))
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    jolt(weft.adapt(model, weft.LoRA(rank=2, targets="c_attn")))
    weft.save(model, tmp_path / "a")
    ran = run("merge", "--model", tmp_path / "base", "--adapter", tmp_path / "a", "-o", tmp_path / "merged")
    assert ran.code == 0 and "the same in 16 of 16 places" in ran.out, ran.err


def test_merge_replaces_a_model_when_told(world: World, run: Run, tmp_path: Path) -> None:
    words = ["merge", "--model", world.base, "-o", tmp_path / "merged"]
    assert run(*words, "--adapter", world.a).code == 0
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert run(*words, "--adapter", world.b).code == 2
    assert run(*words, "--adapter", world.b, "--overwrite").code == 0
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
