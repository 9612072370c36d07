"""Trains the embedded base from the token ids that `tokens.py` made. One GPU, bf16 autocast, a few minutes.

    python pretrain.py TOKENS OUT [--recipe recipe.json] [--minutes M]

OUT gets the model (config.json, model.safetensors in bf16, generation_config.json, the tokenizer's files) and `training.json`.
Matrices are trained by Muon (momentum, then the nearest orthogonal matrix by five Newton-Schulz steps), everything else by AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

KINDS = ("docs", "prose", "code", "skills")
BOS, END, PAD, SYSTEM, USER, ASSISTANT = range(6)  # the order in tokens.SPECIAL


def orthogonal(g: Tensor) -> Tensor:
    """Nearly the orthogonal factor of every matrix in a stack (n, rows, columns): quintic Newton-Schulz, as in the Muon optimiser."""
    x = g.bfloat16() if g.is_cuda else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    flip = x.size(-2) > x.size(-1)
    x = x.mT if flip else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if flip else x).to(g.dtype)


class Muon:
    """Momentum, orthogonalised, for matrices; those of one shape are stepped together."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float, weight_decay: float) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.groups = [[p for p in matrices if tuple(p.shape) == s] for s in shapes]
        self.buffers = [torch.zeros(len(g), *s, device=g[0].device) for g, s in zip(self.groups, shapes, strict=True)]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([p.grad for p in group])
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonal(grad.lerp(buffer, self.momentum)) * max(1.0, grad.size(-2) / grad.size(-1)) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr)


def noise(model: nn.Module, share: Tensor, tokens: Tensor) -> None:
    """Dropout, by row (n,): `share` of what every attention and every MLP adds, and `tokens` whole embeddings. Prose is little and is seen many times:
    without this it is learned by heart after ten passes. Only where gradients are wanted."""

    def drop(_: nn.Module, __: object, y: Tensor) -> Tensor | None:
        return y * (torch.rand_like(y) >= share[:, None, None]) / (1 - share[:, None, None]) if torch.is_grad_enabled() else None

    def blind(_: nn.Module, __: object, y: Tensor) -> Tensor | None:
        return y * (torch.rand_like(y[..., :1]) >= tokens[:, None, None]) if torch.is_grad_enabled() else None

    model.model.embed_tokens.register_forward_hook(blind)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


class Data:
    """The token ids on the device; batches of windows, a pure function of the seed."""

    def __init__(self, file: Path, recipe: dict, device: str) -> None:
        with np.load(file) as arrays:
            self.ids = {k: torch.from_numpy(arrays[k].astype(np.int32)).to(device) for k in arrays.files}
        self.length, self.device = recipe["length"], device
        share = torch.tensor([recipe["mixture"][k] for k in KINDS])
        self.rows = (share / share.sum() * recipe["rows"]).round().int().tolist()
        # Windows begin anywhere, or (a short second stage) where a text begins.
        self.starts = {k: torch.nonzero(v[: -self.length - 1] == BOS).cpu() for k, v in self.ids.items()} if recipe.get("aligned") else None
        self.generator = torch.Generator().manual_seed(recipe["seed"])

    def batch(self) -> Tensor:
        """(rows, length + 1) token ids."""
        out = []
        for kind, n in zip(KINDS, self.rows, strict=True):
            ids = self.ids[f"train.{kind}"]
            if self.starts is None:
                start = torch.randint(0, len(ids) - self.length - 1, (n, 1), generator=self.generator)
            else:
                starts = self.starts[f"train.{kind}"]
                start = starts[torch.randint(0, len(starts), (n,), generator=self.generator)]
            out.append(ids[(start + torch.arange(self.length + 1)).to(self.device, non_blocking=True)])
        return torch.cat(out).long()

    def windows(self, name: str, limit: int) -> Tensor:
        """(n, length + 1) windows side by side, that together read every token but the first once; the last one is filled with PAD."""
        ids = self.ids[name][: limit * self.length + 1]
        n = math.ceil((len(ids) - 1) / self.length)
        return F.pad(ids, (0, n * self.length + 1 - len(ids)), value=PAD).unfold(0, self.length + 1, self.length).long()


def roles(ids: Tensor) -> Tensor:
    """The special token that stands last at or before every position (n, T): who speaks. Plain text, and what a window cuts: BOS."""
    marks = (ids == BOS) | (ids == SYSTEM) | (ids == USER) | (ids == ASSISTANT)
    at = torch.where(marks, torch.arange(ids.size(1), device=ids.device), 0).cummax(1).values
    return torch.where(marks, ids, BOS).gather(1, at)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of every next token, (n, T - 1), nats."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def measure(model: nn.Module, data: Data, counts: dict, limit: int, sides: tuple[str, ...] = ("held_out", "train")) -> dict[str, dict[str, float]]:
    """Held-out (and as much train) loss per kind: nats a token, and bits per byte of text. The tokens that mark turns count as bits, not as bytes."""
    out: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        out[kind] = {}
        for side in sides:
            found = data.windows(f"{side}.{kind}", limit)
            total, n = 0.0, 0
            for part in found.split(32):
                loss = losses(model, part)
                keep = part[:, 1:] != PAD
                total, n = total + loss[keep].double().sum().item(), n + int(keep.sum())
            c = counts[f"{side}.{kind}"]
            out[kind][f"{side}_nats"] = total / n
            out[kind][f"{side}_bits_per_byte"] = total / n / math.log(2) * c["tokens"] / c["bytes"]
    return out


@torch.no_grad()
def answers_right(model: nn.Module, data: Data, limit: int) -> float:
    """Share of the held-out skills' answers that greedy decoding would give exactly (every token of the answer is the most likely one)."""
    right, n = 0, 0
    for part in data.windows("held_out.skills", limit).split(32):
        best = model(input_ids=part[:, :-1], use_cache=False).logits.argmax(-1)
        spoken = (roles(part[:, :-1]) == ASSISTANT) & (part[:, :-1] != END)
        wrong = (best != part[:, 1:]) & spoken
        turn = torch.cumsum((part[:, :-1] == ASSISTANT).int(), 1)
        for row in range(len(part)):
            whole = max(0, int(turn[row].max()) - int(part[row, -1] != END))  # an answer that the window cuts off does not count
            bad = torch.unique(turn[row][wrong[row]])
            right, n = right + whole - int((bad <= whole).sum()), n + whole
    return right / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.json"))
    parser.add_argument("--start", type=Path, help="go on from this model instead of from nothing")
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe's (the schedule is fitted to them)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    recipe = json.loads(args.recipe.read_text())
    steps = args.steps or recipe["steps"]
    counts = json.loads((args.tokens / "corpus.json").read_text())["counts"]
    torch.manual_seed(recipe["seed"])
    torch.set_float32_matmul_precision("high")
    data = Data(args.tokens / "tokens.npz", recipe, args.device)
    config = LlamaConfig(**recipe["model"], bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD)
    model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32) if args.start else LlamaForCausalLM(config)
    model.to(args.device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = Muon(matrices, recipe["momentum"], recipe["weight_decay"])
    adam = torch.optim.AdamW([{"params": [p for p in others if p.ndim == 2], "weight_decay": recipe["embedding_decay"]},
                              {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}], betas=(0.9, 0.95), fused=args.device == "cuda")
    weight = torch.ones(6, device=args.device)
    weight[SYSTEM] = weight[USER] = recipe["question_weight"]

    def objective(ids: Tensor) -> Tensor:
        w = weight[roles(ids[:, :-1])]
        return (losses(model, ids) * w).sum() / w.sum()

    by_row = [torch.tensor([recipe[key][k] for k, n in zip(KINDS, data.rows, strict=True) for _ in range(n)], device=args.device) for key in ("dropout", "blind")]
    noise(model, *by_row)
    run = objective if args.eager else torch.compile(objective)
    history, start = [], time.time()
    for step in range(steps + 1):
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device == "cuda"):
            if step and (step % recipe["every"] == 0 or step == steps):
                found = measure(model, data, counts, recipe["windows"]) | {"step": step, "seconds": round(time.time() - start, 1), "skills_right": answers_right(model, data, recipe["windows"])}
                history.append(found)
                short = {k: "/".join(f"{found[k][s + '_nats']:.3f}" for s in ("held_out", "train")) for k in KINDS}
                print(f"{step} {time.time() - start:.0f}s held-out/train nats {short} skills right {found['skills_right']:.3f}", flush=True)
            if step == steps:
                break
            loss = run(data.batch())
        loss.backward()
        rate = min(1.0, (step + 1) / recipe["warmup"]) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        muon.step(recipe["matrix_lr"] * rate)
        for group in adam.param_groups:
            group["lr"] = recipe["other_lr"] * rate
        adam.step()
        model.zero_grad(set_to_none=True)
    seconds = time.time() - start
    # What is shipped is bf16: the figures are those of the rounded weights, computed in fp32.
    model.to(torch.bfloat16).float()
    torch.set_float32_matmul_precision("highest")
    data.length = recipe["model"]["max_position_embeddings"]
    final = measure(model, data, counts, recipe["final_windows"]) | {"skills_right": answers_right(model, data, recipe["final_windows"] // 2)}
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD, do_sample=False, max_new_tokens=128)
    model.save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.tokens / name, args.out / name)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    report = {"final": final, "seconds": round(seconds, 1), "steps": steps, "started_from": args.start is not None, "tokens": steps * sum(data.rows) * recipe["length"], "machine": machine,
              "torch": torch.__version__, "parameters": sum(p.numel() for p in model.parameters()), "recipe": recipe, "history": history}
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(final, indent=1), f"{report['tokens'] / seconds:.0f} tokens/s", report["parameters"])


if __name__ == "__main__":
    main()
