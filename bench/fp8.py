"""Whether products in fp8 train as well as those in 16 bit: gradients on real weights, and the losses of whole runs.

    python bench/fp8.py [--steps 500] [--shapes embedded 1B]

Gradients: those of one batch on the embedded base stored in fp8, by fp8 products and by bf16 products of the decoded weights, each
against fp32 arithmetic on the same decoded weights. Runs: LoRA on this repository's own text, the same batches and seeds on a bf16 base
in bf16 and on an fp8 base with fp8 products; their losses by windows of 50 steps, and on held-out text. A third run is the first one
without a compiler: it rounds elsewhere and differs in nothing else, so it says how far apart two runs drift that are both right. The 1B
shape has random weights. Needs a CUDA device with fp8 units.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save

import weft
from train import SHAPES
from weft.data import DataConfig, load_rows, pad, prepare
from weft.quant import dense, is_quantised, quantise_
from weft.step import loss_sum
from weft.step.fp8 import narrowable
from weft.train import EvalConfig, Recipe, TrainConfig

ROOT, WINDOW, TOKENS = Path(__file__).parent.parent, 50, 2048
CONTROL = "bf16 not compiled"
KINDS = ("bf16", "fp8", CONTROL)


def texts(folder: Path) -> tuple[Path, Path]:
    """The repository's prose and code as rows of about 1200 characters: (train, held out)."""
    rows = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py")]):
        text = path.read_text()
        rows += [text[i : i + 1200] for i in range(0, len(text), 1200)]
    places = folder / "train.jsonl", folder / "held.jsonl"
    for place, kept in zip(places, ([r for i, r in enumerate(rows) if i % 20], rows[::20][:100]), strict=True):
        place.write_text("".join(json.dumps({"text": r}) + "\n" for r in kept))
    return places


def apart(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    return {"distance": float((a - b).norm() / b.norm()), "cosine": float(torch.dot(a, b) / (a.norm() * b.norm()))}


def gradients(train: Path) -> dict[str, Any]:
    tokenizer = weft.load_tokenizer("embedded")
    examples = prepare(load_rows(str(train)), tokenizer, DataConfig(train=str(train)), progress=False).examples[:16]
    batch, found = pad(examples).to("cuda"), {}

    def flat(model: Any, narrow: bool) -> torch.Tensor:
        torch.manual_seed(0)
        weft.adapt(model, weft.LoRA(rank=8)).train()
        parameters = list(weft.adapters.trainable(model, "default").values())
        with torch.no_grad():
            for p in parameters:
                p.add_(0.02 * torch.randn_like(p))
        for layer in narrowable(model).values():
            layer.narrow = narrow
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_sum(model, batch), parameters)])

    stored = weft.load_base("embedded", base="fp8", device="cuda")
    exact = weft.load_base("embedded", base="fp32", device="cuda")
    packed = {p: m for p, m in stored.named_modules() if is_quantised(m)}
    for path, module in exact.named_modules():
        if path in packed:
            module.weight.data.copy_(dense(packed[path]).float())
    want = flat(exact, False)
    for name, narrow in (("bf16 products", False), ("fp8 products", True)):
        found[name] = apart(flat(weft.load_base("embedded", base="fp8", device="cuda"), narrow), want)
        print(name, found[name], flush=True)
    return found


def run(shape: str, kind: str, steps: int, train: Path, held: Path, folder: Path) -> list[dict[str, float]]:
    """One run's log. kind: one of KINDS."""
    base = kind.split()[0]
    tokenizer = weft.load_tokenizer("embedded")
    if shape == "embedded":
        model = weft.load_base("embedded", base=base, device="cuda")
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape] | {"vocab_size": len(tokenizer)}))
        torch.set_default_dtype(torch.float32)
        model.requires_grad_(False)
        if base == "fp8":
            quantise_(model, "fp8")
    recipe = Recipe(
        method=weft.LoRA(rank=16, alpha=32), data=DataConfig(train=str(train), eval=str(held)), output=str(folder / f"{shape}-{kind}"),
        train=TrainConfig(lr=1e-3, steps=steps, tokens=TOKENS, log_every=1, device="cuda", progress="off", fp8=base == "fp8",
                          compile=False if kind == CONTROL else None),
        eval=EvalConfig(start=False, train_rows=0),
    )  # fmt: skip
    return weft.fit(model, recipe, tokenizer=tokenizer, on_event=tell).history


def tell(event: dict[str, Any]) -> None:
    if event["event"] == "note":
        print(event["text"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--shapes", nargs="*", default=["embedded", "1B"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, held = texts(folder)
        result: dict[str, Any] = {"gradients": gradients(train), "steps": args.steps, "tokens_a_step": TOKENS, "runs": {}}
        for shape in args.shapes:
            logs = {kind: run(shape, kind, args.steps, train, held, folder) for kind in KINDS}
            means, ends = {}, {}
            for kind, log in logs.items():
                losses = [line["loss"] for line in log if "loss" in line]
                means[kind] = [statistics.mean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]
                ends[kind] = next(line["eval_loss"] for line in reversed(log) if "eval_loss" in line)
            result["runs"][shape] = {"windows": means, "held_out": ends}
            for kind, prefix in (("fp8", ""), (CONTROL, "control_")):
                apart_by = [b / a - 1 for a, b in zip(means["bf16"], means[kind], strict=True)]
                result["runs"][shape] |= {f"{prefix}largest_difference": max(apart_by, key=abs), f"{prefix}last_difference": apart_by[-1],
                                          f"{prefix}held_out_difference": ends[kind] / ends["bf16"] - 1}  # fmt: skip
            print(json.dumps(result["runs"][shape]), flush=True)
            save("fp8", result)


if __name__ == "__main__":
    main()
