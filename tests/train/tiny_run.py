"""A real run that is small enough to be killed often: a random Llama of 30 thousand parameters learns to write capitals."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weft.core import WeftError
from weft.train import Recipe, Result, fit, load_recipe, run_recipe

CONTEXT = multiprocessing.get_context("forkserver")  # real processes that can be killed, without importing torch for each
CONTEXT.set_forkserver_preload(["tiny_run"])

ASSISTANT = 259  # the token of <|assistant|>
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    marks = ["<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    made.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE)


def model(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=261, pad_token_id=256, tie_word_embeddings=tied,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def rows(folder: Path, n: int = 40, seed: int = 0) -> Path:
    """n prompts in small letters, and the same in capitals."""
    rng = random.Random(seed)
    file = folder / f"rows{seed}.jsonl"
    with file.open("w") as f:
        for _ in range(n):
            word = "".join(rng.choice("abcd") for _ in range(rng.randint(2, 6)))
            f.write(json.dumps({"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]}) + "\n")
    return file


def recipe(folder: Path, **overrides: Any) -> Recipe:
    """A recipe in dots: `train__lr=1e-3` for train.lr."""
    given = {
        "data.train": str(rows(folder)), "data.eval": str(rows(folder, 12, 1)), "output": str(folder / "out"), "method": "LoRA",
        "method.rank": 4, "method.dropout": 0.1, "train.lr": 5e-3, "train.steps": 20, "train.tokens": 64, "train.progress": "off",
        "train.log_every": 1, "train.threads": 1, "train.save_seconds": None, "train.eval_every": 10,
    }  # fmt: skip
    own = {k.replace("__", "."): v for k, v in overrides.items()}
    if own.get("method", "LoRA") != "LoRA":
        given = {k: v for k, v in given.items() if not k.startswith("method.")}
    given |= own
    return load_recipe({}, given)


def run(folder: Path, **overrides: Any) -> Result:
    if "base" not in overrides:
        return fit(model(), recipe(folder, **overrides), tokenizer=tokenizer())
    base = folder.parent / "base"  # packed as it is read; one path, which stands in the adapter's configuration
    if not base.is_dir():
        model().save_pretrained(folder / "making")
        tokenizer().save_pretrained(folder / "making")
        (folder / "making").rename(base)
    return run_recipe(recipe(folder, model=str(base), **overrides))


def start(folder: Path, overrides: dict[str, Any], limit: int = resource.RLIM_INFINITY) -> BaseProcess:
    """`run` in a process of its own, which cannot write files beyond `limit` bytes."""
    paths = [str(Path(__file__).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # Python 3.11's fork server knows no other way to this module
    process = CONTEXT.Process(target=child, args=(folder, overrides, limit))
    process.start()
    return process


def child(folder: Path, overrides: dict[str, Any], limit: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(folder, **overrides)
    except WeftError as e:
        (folder / "error.txt").write_text(str(e))
        raise SystemExit(2) from e
