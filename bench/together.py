"""Eight adapters trained at once on one base, against eight runs one after another: time and peak memory, and the same adapters.

    python bench/together.py                                   the embedded base, rows of the demo, on a CPU
    python bench/together.py --device cuda --shape 1B          a Llama's shape with random weights in bf16, full rows of random words

Ranks and learning rates differ, the data is the same. Batches are small, as they are where one trains a small adapter: that is where
sharing pays, since a small batch does not fill the machine. `seconds` is all of it, `prepare_seconds` of it compiling and checking;
`tokens_per_s` is of the steps alone. In bf16 two ways of summing drift apart over the steps, by more the larger the learning rate:
`losses_apart` says how far.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save
from safetensors.torch import load_file

import weft
from train import SHAPES, base
from weft.data import DataConfig, demo
from weft.step import peak_memory, reset_peak_memory
from weft.train import EvalConfig, Recipe, Result, TrainConfig

LENGTH = 256  # tokens of a row of random words


def recipes(data: Path, folder: Path, args: Any) -> list[Recipe]:
    return [
        Recipe(
            name=f"run{i}", method=weft.LoRA(rank=args.ranks[i % len(args.ranks)], alpha=16), output=str(folder / f"run{i}"), seed=i,
            data=DataConfig(train=str(data), max_length=LENGTH), eval=EvalConfig(start=False, rows=0, train_rows=0),
            train=TrainConfig(
                lr=args.lr * (1 + i), steps=args.steps, tokens=args.tokens, device=args.device, progress="off", save_seconds=None,
                log_every=5, graphs=False if args.no_graphs else None,
            ),
        )
        for i in range(args.adapters)
    ]  # fmt: skip


def words(folder: Path, rows: int, many: int) -> tuple[Any, Path]:
    """A tokenizer of so many words, and rows of as many of them as fit."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(many - 3)]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rng, file = random.Random(0), folder / "words.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(rng.choices(names[3:], k=LENGTH))}) + "\n" for _ in range(rows)))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"), file


def spent(results: list[Result], at_once: bool) -> float:
    """Tokens a second while stepping, of all runs."""
    if at_once:
        return sum(r.tokens_per_s for r in results)
    return sum(r.tokens for r in results) / sum(r.tokens / r.tokens_per_s for r in results)


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="of bench/train.py, in place of the embedded base")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", help="in turn; alone, each is compiled for (default: 4 8 12 16, or 8 16)")
    parser.add_argument("--lr", type=float, help="of the first; the second has twice as much, and so on (default: 1e-3, or 1e-4)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, help="of each adapter's batch (default: 256, or 2048)")
    parser.add_argument("--no-graphs", action="store_true", help="layers one by one on a card, both ways")
    args = parser.parse_args()
    big, cuda = args.shape is not None, args.device.startswith("cuda")
    args.ranks = args.ranks or ([8, 16] if big else [4, 8, 12, 16])
    usual = 2048 if big else 256
    args.lr, args.tokens = args.lr or (1e-4 if big else 1e-3), args.tokens or usual
    result: dict[str, Any] = vars(args).copy()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folders = {k: place / k for k in ("together", "one_after_another")}
        if big:
            tokenizer, data = words(place, args.tokens // LENGTH * 10, SHAPES[args.shape]["vocab_size"] // 8)
            model = base(args.shape, args.device)
        else:
            tokenizer, data = weft.load_tokenizer("embedded"), demo.write("dates", temporary, train=400, held_out=1)[0]
            model = weft.load_base("embedded", base="fp32", device=args.device)
        if not cuda:  # there the first steps compile, and are told apart from the others
            weft.fit_together(model, recipes(data, place / "warm", args)[:2], tokenizer=tokenizer)
        results: dict[str, list[Result]] = {}
        prepared: list[float] = []

        def told(event: dict[str, Any]) -> None:
            if event["event"] == "note":
                print(event.get("name", "alone"), event["text"], flush=True)
            elif event["event"] == "prepared":
                prepared.append(event["seconds"])

        for way, folder in folders.items():
            if weft.adapters.names(model):
                weft.remove(model)
            if cuda:
                reset_peak_memory(torch.device("cuda"))
            prepared.clear()
            start = time.perf_counter()
            if way == "together":
                results[way] = weft.fit_together(model, recipes(data, folder, args), tokenizer=tokenizer, on_event=told)
            else:
                results[way] = []
                for recipe in recipes(data, folder, args):
                    results[way].append(weft.fit(model, recipe, tokenizer=tokenizer, on_event=told))
                    weft.remove(model)
            seconds, speed = time.perf_counter() - start, spent(results[way], way == "together")
            result[way] = {"seconds": seconds, "prepare_seconds": sum(prepared), "tokens_per_s": speed}
            if cuda:
                waited = [line.get("host_gap", 0.0) for r in results[way][: 1 if way == "together" else None] for line in r.history]
                result[way] |= {"peak_bytes": peak_memory(torch.device("cuda")), "card_waited_s": sum(waited)}
            print(way, result[way], flush=True)
        weights, losses = [], []
        for i, pair in enumerate(zip(*results.values(), strict=True)):
            a, b = (load_file(folder / f"run{i}" / "adapter_model.safetensors") for folder in folders.values())
            weights.append(max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b))
            x, y = ([line["loss"] for line in r.history if "loss" in line] for r in pair)
            losses.append(max(abs(p - q) for p, q in zip(x, y, strict=True)))
    one, other = result["together"], result["one_after_another"]
    result["times_faster"] = {"all": other["seconds"] / one["seconds"], "steps": one["tokens_per_s"] / other["tokens_per_s"]}
    result |= {"weights_apart": max(weights), "losses_apart": max(losses)}
    print(result)
    name = ["together", *([args.shape.replace(" ", "_")] if big else []), *([str(args.tokens)] if args.tokens != usual else [])]
    print(save("_".join(name + ["no_graphs"] * args.no_graphs + ["gpu"] * cuda), result))


if __name__ == "__main__":
    main()
