"""What each frozen format costs the embedded base: held-out bits per byte, error of the weights, bits per weight.

    python bench/quant_quality.py            # bench/results/quant_quality.json; a minute on two CPU cores

Held out are texts of this repository that the base has not seen, three decision records and tests/base/piece.txt (some 9 kB), in windows of
512 tokens with nothing carried over.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save
from torch.nn import functional as F

import weft
from weft.quant import quantise_

ROOT = Path(__file__).parent.parent
RECORDS = ("0001-a-slot-by-class-swap.md", "0002-merged-is-a-dict-of-parameters.md", "0004-one-flat-buffer-and-exact-resume.md")
TRIED: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {}), ("nf4", {"quant_scale": "mse"}), ("nf4", {"nested": False}), ("nf4", {"block": 128}),
    ("nf4", {"block": 128, "quant_scale": "mse"}), ("fp4", {}), ("int8", {}), ("fp8", {}),
]  # fmt: skip


@torch.no_grad()
def bits_per_byte(model: Any, texts: list[str], tokenizer: Any) -> float:
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        for start in range(0, len(ids) - 1, 512):
            window = ids[start : start + 513]
            nats += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
        size += len(text.encode())
    return nats / math.log(2) / size


def main() -> None:
    names = ["tests/base/piece.txt", *(f"docs/decisions/{n}" for n in RECORDS)]
    texts, tokenizer = [(ROOT / n).read_text(encoding="utf-8") for n in names], weft.load_tokenizer("embedded")
    whole = bits_per_byte(weft.load_base("embedded", base="fp32", device="cpu"), texts, tokenizer)
    rows = [{"base": "fp32", "options": {}, "bits_per_byte": whole}]
    print(rows[0], flush=True)
    for base, options in TRIED:
        model = weft.load_base("embedded", base="fp32", device="cpu")
        report = quantise_(model, base, **options)
        found = bits_per_byte(model, texts, tokenizer)
        rows.append({"base": base, "options": options, "bits_per_byte": found, "over_fp32": found - whole, "weight_error": report.error,
                     "bits_per_weight": report.bits})  # fmt: skip
        print(rows[-1], flush=True)
    print(save("quant_quality", {"texts": names, "bytes": sum(len(t.encode()) for t in texts), "rows": rows}))


if __name__ == "__main__":
    main()
