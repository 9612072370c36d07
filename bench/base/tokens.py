"""Builds the tokenizer and the token ids that `pretrain.py` reads.

    python tokens.py OUT [--python EXE ...] [--vocabulary 4096] [--skills 400000] [--tokenizer FOLDER]

OUT gets `tokens.npz` (uint16 ids per kind and side, and the bytes of text they stand for) and the tokenizer's files.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
from pathlib import Path

import corpus
import lexicon
import numpy as np
import rows as chats
from bank import Bank
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, END, PAD, SYSTEM, USER, ASSISTANT = SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
# A piece never spans a digit and a neighbour, so numbers are read digit by digit; a space goes with the word that follows.
PIECES = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+| +(?=\S)|\s+"
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('Unknown role: ' + message['role'] + '. Use system, user or assistant.') -}}{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END, "pad_token": PAD, "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
              "model_max_length": 1024, "clean_up_tokenization_spaces": False, "padding_side": "right", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def sentences(documents: list[corpus.Document]) -> list[str]:
    """Short plain sentences of the documents, in order."""
    out: dict[str, None] = {}
    for d in documents:
        if d.kind != "code":
            for s in re.findall(r"(?:(?<=\. )|(?<=\n))[A-Z][a-z]*(?:,? [A-Za-z'-]+){3,12}\.(?=\s)", d.text):
                out[s] = None
    return list(out)


def words(documents: list[corpus.Document], at_least: int) -> list[str]:
    count = collections.Counter(w for d in documents if d.kind != "code" for w in re.findall(r"(?<= )[a-z]{2,12}(?=[ ,.])", d.text))
    return sorted(w for w, n in count.items() if n >= at_least)


def pieces(document: corpus.Document, rng: random.Random) -> list[str]:
    """A document of prose cut into runs of one to eight paragraphs, each a text of its own: otherwise hardly any text would begin with a sentence."""
    if document.kind == "code":
        return [document.text]
    paragraphs, out = document.text.split("\n\n"), []
    while paragraphs:
        n = rng.randint(1, 8)
        out.append("\n\n".join(paragraphs[:n]))
        paragraphs = paragraphs[n:]
    return [p for p in out if p.strip()]


def wrap(row: list[dict[str, str]]) -> str:
    """A row as the text that is tokenised: what the chat template gives, with the special tokens in it."""
    return BOS + "".join(f"<|{m['role']}|>{m['content']}{END}" for m in row)


def size(row: list[dict[str, str]]) -> int:
    return sum(len(m["content"].encode()) for m in row)


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    out = []
    for i in range(0, len(texts), 4096):
        out += [np.asarray(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch_fast(texts[i : i + 4096], add_special_tokens=False)]
    return np.concatenate(out)


def questions(documents: list[corpus.Document], rng: random.Random) -> list[list[dict[str, str]]]:
    """Chats in English: what a docstring's first paragraph says about a name, and how a paragraph goes on after its first sentence."""
    rows = []
    go_on = ["Continue the text: {}", "Go on: {}", "What comes next? {}", "{}\nContinue."]
    asks = ["What is {}?", "Explain {}.", "Describe {}", "What does {} do?", "Tell me about {}.", "Documentation of {}"]
    for d in documents:
        for name, text in re.findall(r"(?m)^([a-z_]\w*(?:\.\w+)+)(?:\([^\n]*\))?\n([A-Z][^\n]{30,}(?:\n[^\n]+){0,5})(?=\n\n|\n*\Z)", d.text) if d.kind != "code" else []:
            rows.append([{"role": "user", "content": rng.choice(asks).format(name)}, {"role": "assistant", "content": " ".join(text.split())}])
        for paragraph in d.text.split("\n\n") if d.kind != "code" else []:
            first, _, rest = " ".join(paragraph.split()).partition(". ")
            if 25 < len(first) < 200 and 25 < len(rest) and first[0].isupper() and corpus.is_prose(paragraph):
                rest = rest if len(rest) < 300 else rest[:300].rpartition(". ")[0] + "."
                rows.append([{"role": "user", "content": rng.choice(go_on).format(first + ".")}, {"role": "assistant", "content": rest}])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", nargs="*", default=[], help="interpreters to read; the first one gives the code (default: this one)")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--skills", type=int, default=600_000, help="rows of generated transformations")
    parser.add_argument("--tokenizer", type=Path, help="take this tokenizer.json instead of training one")
    args = parser.parse_args()
    documents, versions = corpus.build(args.python)
    side = {False: [d for d in documents if not d.held_out], True: [d for d in documents if d.held_out]}
    rows: dict[bool, list[list[dict[str, str]]]] = {}
    for held, seed, n in ((False, 1, args.skills), (True, 2, 6000)):
        rng = random.Random(seed)
        bank = Bank(rng, words(side[held], 1 if held else 4), sentences(side[held]))
        rows[held] = [chats.conversation(bank) for _ in range(n)]
        asked = questions(side[held], rng)
        rows[held] += asked
        rng.shuffle(rows[held])
        print("held-out" if held else "train", len(bank.words), "words", len(bank.sentences), "sentences", len(asked), "questions", flush=True)
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer))
    else:
        text = [d.text for d in side[False] if d.kind != "code"]
        code = [d.text for d in side[False] if d.kind == "code"][::20]
        # Everyday words are rare in a programmer's text; counted often enough, they become tokens, which keeps the rows of small tasks short.
        everyday = [f" {w}\n{w}" for w in lexicon.everyday()] * 200
        plain = ["\n".join(m["content"] for m in r) for r in rows[False][:10_000]]
        tokenizer = train_tokenizer(text * 2 + code + plain + everyday, args.vocabulary)
    save_tokenizer(tokenizer, args.out)
    arrays, counts = {}, {}
    rng = random.Random(3)
    for held, name in ((False, "train"), (True, "held_out")):
        for kind in ("docs", "prose", "code"):
            texts = [p for d in side[held] if d.kind == kind for p in pieces(d, rng)]
            arrays[f"{name}.{kind}"] = encode(tokenizer, [BOS + t + END for t in texts])
            counts[f"{name}.{kind}"] = {"files": sum(d.kind == kind for d in side[held]), "bytes": sum(len(t.encode()) for t in texts)}
        arrays[f"{name}.skills"] = encode(tokenizer, [wrap(r) for r in rows[held]])
        counts[f"{name}.skills"] = {"rows": len(rows[held]), "bytes": sum(map(size, rows[held]))}
    for key, value in counts.items():
        value["tokens"] = len(arrays[key])
    meta = {"pythons": versions, "vocabulary": tokenizer.get_vocab_size(), "counts": counts}
    np.savez_compressed(args.out / "tokens.npz", **arrays)
    (args.out / "corpus.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
