"""What each frozen format costs the embedded base: bits per byte of its held-out text, error of the weights, bits per weight.

    python bench/quant_quality.py --python python3.11 python3.13 python3.12     # bench/results/quant_quality.json; 10 minutes on a core

The held-out text lies in no file: `bench/base/corpus.py` makes it again from the interpreters that the base was trained on (3.11.7,
3.13.0 and 3.12.1; others give nearly the same). Read in windows of 512 tokens with nothing carried over. What is given beside a
difference to fp32 is its standard error over the windows, so that chance can be told from cost.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "base")]

import corpus
import torch
import torch.nn.functional as F
from _common import save
from rows import conversation
from tokens import Bank, encode, pieces, questions, sentences, size, words, wrap

import weft
from weft.quant import quantise_

KINDS = ("docs", "prose", "code", "skills")
LENGTH = 512
TRIED: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {}), ("nf4", {"quant_scale": "mse"}), ("nf4", {"nested": False}), ("nf4", {"block": 128}),
    ("nf4", {"block": 128, "quant_scale": "mse"}), ("nf4", {"rounding": "stochastic"}), ("fp4", {}), ("fp4", {"quant_scale": "mse"}),
    ("int8", {}), ("fp8", {}),
]  # fmt: skip


def held_out(pythons: list[str]) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """(by kind the texts with their special tokens, and the bytes that they stand for; the versions that they came from)."""
    documents, versions = corpus.build(pythons)
    mine, rng = [d for d in documents if d.held_out], random.Random(2)
    bank = Bank(rng, words(mine, 1), sentences(mine))
    chats = [conversation(bank) for _ in range(3000)] + questions(mine, rng)
    rng.shuffle(chats)
    found = {kind: [(f"<|bos|>{t}<|end|>", len(t.encode())) for d in mine if d.kind == kind for t in pieces(d, rng)] for kind in KINDS[:3]}
    return found | {"skills": [(wrap(r), size(r)) for r in chats]}, versions


def windows(texts: list[tuple[str, int]], tokenizer: Any, most: int) -> tuple[torch.Tensor, int]:
    """((n, 513) ids side by side, the bytes that they stand for): whole texts, at random, until there are as many tokens as wanted."""
    random.Random(0).shuffle(texts)
    ids: list[int] = []
    bytes_read = 0
    for text, n in texts:
        more = encode(tokenizer, [text]).tolist()
        if ids and len(ids) + len(more) > most:
            continue
        ids, bytes_read = ids + more, bytes_read + n
    whole = (len(ids) - 1) // LENGTH * LENGTH
    read = torch.tensor(ids[: whole + 1]).unfold(0, LENGTH + 1, LENGTH)
    return read, round(bytes_read * whole / (len(ids) - 1))


@torch.no_grad()
def nats(model: Any, read: torch.Tensor) -> torch.Tensor:
    """(n,) of each window, the sum over its tokens."""
    found = []
    for part in read.split(16):
        logits = model(part[:, :-1], use_cache=False).logits.float()
        found.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").double().sum(1))
    return torch.cat(found)


def over(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, float, dict[str, dict[str, float]]]:
    """(mean over the kinds of what `found` is above `other`, its standard error, both for each kind): differences window by window."""
    apart = {k: found[k] - other[k] for k in KINDS}
    each = {k: {"over": v.sum().item(), "standard_error": v.std().item() * len(v) ** 0.5} for k, v in apart.items()}
    mean = sum(e["over"] for e in each.values()) / len(KINDS)
    return mean, sum(e["standard_error"] ** 2 for e in each.values()) ** 0.5 / len(KINDS), each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", default=[], help="interpreters whose library and documentation is read (default: this one)")
    parser.add_argument("--tokens", type=int, default=40_000, help="of each kind, at most")
    args = parser.parse_args()
    texts, versions = held_out(args.python)
    tokenizer = weft.load_tokenizer("embedded").backend_tokenizer
    read = {kind: windows(texts[kind], tokenizer, args.tokens) for kind in KINDS}

    def measure(model: Any) -> dict[str, torch.Tensor]:  # bits per byte as the sum over the windows
        return {kind: nats(model, ids) / math.log(2) / n for kind, (ids, n) in read.items()}

    made: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    whole = measure(weft.load_base("embedded", base="fp32", device="cpu"))
    rows: list[dict[str, Any]] = [{"base": "fp32", "options": {}, "bits_per_byte": {k: v.sum().item() for k, v in whole.items()}}]
    print(rows[0], flush=True)
    for base, options in TRIED:
        model = weft.load_base("embedded", base="fp32", device="cpu")
        report = quantise_(model, base, **options)
        found = measure(model)
        made[base, str(options)] = found
        mean, error, each = over(found, whole)
        rows.append({
            "base": base, "options": options, "bits_per_byte": {k: v.sum().item() for k, v in found.items()},
            "over_fp32": mean, "standard_error": error, "kinds": each, "weight_error": report.error, "bits_per_weight": report.bits,
        })  # fmt: skip
        if options.get("quant_scale") == "mse":
            plain = made[base, str({k: v for k, v in options.items() if k != "quant_scale"})]
            mean, error, _ = over(found, plain)
            rows[-1] |= {"over_absmax": mean, "over_absmax_standard_error": error}
        print(base, options, {k: v for k, v in rows[-1].items() if "over" in k or "error" in k}, flush=True)
    sizes = {k: {"tokens": ids[:, 1:].numel(), "bytes": n} for k, (ids, n) in read.items()}
    what = "held-out text of the base, the mean over four kinds"
    print(save("quant_quality", {"what": what, "pythons": versions, "texts": sizes, "rows": rows}))


if __name__ == "__main__":
    main()
