"""A tiny base with its tokenizer, two adapters and some rows on the disk, made once; and the command, run in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import weft
from tests.conftest import jolt, llama
from weft.cli.main import main

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@dataclass(frozen=True)
class World:
    """base: a Llama of two layers. a, b: LoRA adapters of rank 4 for it. rows: prompts and completions."""

    base: Path
    a: Path
    b: Path
    rows: Path

    @property
    def flags(self) -> list[str]:
        """Of a quick `weft train`, but for the output."""
        return ["--model", str(self.base), "--data.train", str(self.rows), "--train.steps", "2", "--train.threads", "1"]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    marks = ["<pad>", "<eos>", "<user>", "<assistant>", "<system>"]
    made.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE)


def base(folder: Path, seed: int = 0, **more: object) -> Path:
    """Save a tiny random Llama and its tokenizer."""
    words = tokenizer()
    model = llama(seed, **{"vocab_size": len(words), "max_position_embeddings": 160, "bos_token_id": None, "pad_token_id": 256,
                           "eos_token_id": 257, "initializer_range": 0.3} | more)  # fmt: skip
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    made = World(base(root / "base"), root / "a", root / "b", root / "rows.jsonl")
    write_rows(made.rows, [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(24)])
    model = weft.load_base(made.base)
    for seed, folder in enumerate((made.a, made.b)):
        weft.adapt(model, weft.LoRA(rank=4), folder.name)
        jolt(model, 0.2, seed)
        weft.save(model, folder, folder.name)
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ran]]:
    """run("merge", "--adapter", ...) -> exit code and what was printed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(w) for w in words])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    yield call
    torch.set_num_threads(threads)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of its bytes."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for p in found}
