"""LoRA training on Llama shapes with random weights, weft beside peft, peft + liger and unsloth, each row in a process of its own.

    python bench/train.py [--rows "8B bf16, most speed" ...] [--seconds 560]
    python bench/train.py --join a.json b.json       # rows that were run on several cards, or earlier: a later file's take their place

For each row: tokens a second, TFLOP/s at 4·P·T (forward and dX; a frozen base needs no dW, and recomputation is not credited) plus
attention, as a share of a matrix product sustained for seconds in the same run, peak and static memory, seconds to the first step, and
the loss after 20 steps on one fixed batch stream. A step's time is from one step's end to the next as the card sees them, while the host
runs ahead as it does in training (rows up to commit 6ac3f49 waited for the card after each step). A program that is not installed is
named as such. Needs one CUDA device. The peers want peft and liger-kernel; unsloth wants unsloth_zoo, bitsandbytes, trl, datasets,
diffusers, torchao, cut-cross-entropy, tyro, typeguard, shtab, msgspec, hf_transfer, structlog and json5 too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
SHAPES = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                 head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
               vocab_size=128256, tie_word_embeddings=True),
    "1B with biases": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                           head_dim=64, vocab_size=128256, tie_word_embeddings=True, attention_bias=True),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
               head_dim=128, vocab_size=128256, tie_word_embeddings=False),
    "3B MoE": dict(model="Qwen3Moe", hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=16, num_attention_heads=32,
                   num_key_value_heads=4, head_dim=128, num_experts=32, num_experts_per_tok=8, vocab_size=151936, tie_word_embeddings=True),
    "tiny MoE": dict(model="Qwen3Moe", hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, vocab_size=512, tie_word_embeddings=True),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 vocab_size=512, tie_word_embeddings=True),
}  # fmt: skip
BATCH, LENGTH, RANK, STEPS, LR = 4, 2048, 16, 20, 1e-4
# name of the row -> (shape, base, memory, kind of rows, method); in the order of their importance
ROWS: dict[str, tuple[str, str, float, str, str]] = {
    "8B bf16, most speed": ("8B", "bf16", 1.0, "full", "LoRA"),
    "8B bf16, least memory": ("8B", "bf16", 0.0, "full", "LoRA"),
    "8B bf16, layers recomputed": ("8B", "bf16", 0.1, "full", "LoRA"),
    "8B fp8, most speed": ("8B", "fp8", 1.0, "full", "LoRA"),
    "1B bf16, most speed": ("1B", "bf16", 1.0, "full", "LoRA"),
    "0.6B bf16, most speed": ("0.6B", "bf16", 1.0, "full", "LoRA"),
    "1B bf16, short masked rows": ("1B", "bf16", 1.0, "short", "LoRA"),
    "8B DoRA": ("8B", "bf16", 1.0, "full", "DoRA"),
    "8B DoRA, layers recomputed": ("8B", "bf16", 0.1, "full", "DoRA"),
    "3B MoE bf16, experts too": ("3B MoE", "bf16", 1.0, "full", "LoRA"),
    "8B bf16, a tenth lent": ("8B", "bf16", 0.9, "full", "LoRA"),  # of the layers: what they keep waits in the host's memory
    "8B bf16, a quarter lent": ("8B", "bf16", 0.75, "full", "LoRA"),
    "8B bf16, half lent": ("8B", "bf16", 0.5, "full", "LoRA"),
    "8B nf4, least memory": ("8B", "nf4", 0.0, "full", "LoRA"),
    "8B nf4, most speed": ("8B", "nf4", 1.0, "full", "LoRA"),
    "1B fp8, most speed": ("1B", "fp8", 1.0, "full", "LoRA"),
} | {f"1B {method}": ("1B", "bf16", 1.0, "full", method) for method in ("rsLoRA", "VeRA", "AdaLoRA", "IA3", "Bottleneck")} | {
    "1B with biases": ("1B with biases", "bf16", 1.0, "full", "LoRA"),
}
# name of the method -> (weft's name and settings, peft's configuration and settings; None: peft has no such method)
METHODS: dict[str, tuple[str, dict[str, Any], str | None, dict[str, Any]]] = {
    "LoRA": ("LoRA", dict(rank=16, alpha=16), "LoraConfig", dict(r=16, lora_alpha=16)),
    "DoRA": ("DoRA", dict(rank=16, alpha=16), "LoraConfig", dict(r=16, lora_alpha=16, use_dora=True)),
    "rsLoRA": ("LoRA", dict(rank=16, alpha=16, rslora=True), "LoraConfig", dict(r=16, lora_alpha=16, use_rslora=True)),
    "VeRA": ("VeRA", dict(rank=256), "VeraConfig", dict(r=256)),
    "AdaLoRA": ("AdaLoRA", dict(rank=24, target_rank=16, alpha=16), "AdaLoraConfig",
                dict(init_r=24, target_r=16, lora_alpha=16, total_step=1000)),
    "IA3": ("IA3", {}, "IA3Config", dict(feedforward_modules=["down_proj"])),
    "Bottleneck": ("Bottleneck", {}, None, {}),
}
SIDES = ("weft", "unsloth", "peft+liger", "peft")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def counts(shape: str) -> tuple[int, float]:
    """(parameters that multiply a token, attention's FLOPs of one training step over one token at LENGTH, causal)."""
    c = SHAPES[shape]
    d, layers, vocabulary = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    ff = c["moe_intermediate_size"] * c["num_experts_per_tok"] if "num_experts" in c else c["intermediate_size"]  # of a token's experts
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    return layers * (2 * d * q + 2 * d * kv + 3 * d * ff) + d * vocabulary, 3 * layers * 2 * 2 * LENGTH * q / 2


def base(shape: str, device: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    sizes: dict[str, Any] = dict(SHAPES[shape])
    kind = sizes.pop("model", "Llama")
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=8192, rms_norm_eps=1e-5)
    with torch.device(device):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def lengths_of(kind: str) -> list[int]:
    """Row lengths of one micro-batch: full rows, or about as many tokens in short ones (spread as chat data is)."""
    if kind == "full":
        return [LENGTH] * BATCH
    import random

    rng, out = random.Random(0), []
    while sum(out) < BATCH * LENGTH - 400:
        out.append(min(800, max(24, int(rng.lognormvariate(5.0, 0.7)))))
    return out


def batches(kind: str, vocabulary: int, n: int) -> list[Any]:
    """n micro-batches of weft's kind. Short rows: the first two thirds of each row are a prompt and bear no loss."""
    import numpy as np

    from weft.data import Example, pack, pad

    rng, made = np.random.default_rng(0), []
    for _ in range(n):
        examples = []
        for i, length in enumerate(lengths_of(kind)):
            bears = np.arange(length) >= (1 if kind == "full" else 2 * length // 3)
            examples.append(Example(ids=rng.integers(0, vocabulary, length).astype(np.int32), bears=bears, row=i))
        made.append(pad(examples) if kind == "full" else pack(examples))
    return made


def weft_side(shape: str, fmt: str, memory: float, kind: str, method: str, device: str) -> tuple[Any, Any]:
    import torch
    from _common import set_inductor

    import weft
    from weft.data.batches import filled
    from weft.models import attention
    from weft.step import peak_memory, prepare, reset_peak_memory, warm
    from weft.train.flat import Flat

    if device == "cuda":
        set_inductor()
        warm(torch.device(device))  # as `weft train` does when it begins to load
    model = base(shape, device)
    if fmt != "bf16":
        from weft.quant import quantise_

        quantise_(model, fmt)
        torch.cuda.empty_cache()
    assert attention.use(model) or kind == "full", attention.reason(model)  # as `weft train` does
    torch.manual_seed(0)
    name, settings, _, _ = METHODS[method]
    made = getattr(weft, name)(**settings, **({"target_parameters": EXPERTS} if "MoE" in shape else {}))
    weft.adapt(model, made)
    model.train()
    parameters = weft.adapters.trainable(model, "default")
    flat = Flat(parameters, made.lr_scale)
    groups = [p for _, p in flat.groups]
    optimiser = torch.optim.AdamW(groups, lr=LR, weight_decay=0.0, fused=True)
    static = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        reset_peak_memory(torch.device("cuda"))  # of training; what loading takes is another question
    given = batches(kind, SHAPES[shape]["vocab_size"], STEPS)
    if kind == "full":  # what a loader hands over for rows without padding
        given = [replace(b, attention_mask=None).to(device) for b in given]
    else:
        given = [filled(b, BATCH * LENGTH, max(b.lengths)).to(device) for b in given]
    started, facts = time.perf_counter(), {"checking_peak": 0}
    fast = prepare(model, given[0], parameters, memory=memory, varying=False, compile=device == "cuda", fp8=fmt == "fp8", say=print)
    if device == "cuda":
        facts = {"checking_peak": peak_memory(torch.device("cuda"))}
        reset_peak_memory(torch.device("cuda"))

    def step(i: int) -> Any:
        loss = fast.loss(given[i]) / given[i].n_targets
        loss.backward()
        flat.clip(1.0)
        optimiser.step()
        flat.zero_grad()
        return loss.detach()

    return step, facts | {"static": static, "prepare_s": time.perf_counter() - started, "path": fast.describe(), "said": fast.said,
                  "trainable": sum(p.numel() for p in parameters.values())}  # fmt: skip


def peft_side(side: str, shape: str, fmt: str, memory: float, kind: str, method: str) -> tuple[Any, Any]:
    import peft
    import torch

    if "liger" in side:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if fmt == "nf4":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                 bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(saved(shape), quantization_config=how, dtype=torch.bfloat16, device_map={"": 0})
    else:
        model = base(shape, "cuda")
    if memory < 0.2:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    torch.manual_seed(0)
    targets = {"target_modules": TARGETS[:4], "target_parameters": list(EXPERTS)} if "MoE" in shape else {"target_modules": TARGETS}
    if method == "IA3":
        targets = {"target_modules": ["k_proj", "v_proj", "down_proj"]}  # as its paper has it, and weft
    _, _, name, settings = METHODS[method]
    assert name is not None, method
    config = getattr(peft, name)(**settings, **targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    return peers_step(model, shape, kind)


def unsloth_side(shape: str, fmt: str, memory: float, kind: str, method: str) -> tuple[Any, Any]:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(saved(shape)), max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=fmt == "nf4", attn_implementation="sdpa"
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, target_modules=TARGETS, lora_alpha=RANK, lora_dropout=0, bias="none", random_state=0, use_dora=method == "DoRA",
        use_rslora=method == "rsLoRA", use_gradient_checkpointing="unsloth" if memory < 0.2 else False,
    )  # fmt: skip
    return peers_step(model.train(), shape, kind)


def saved(shape: str) -> Path:
    """The shape's random weights as a checkpoint with a tokenizer, for those who load from a folder."""
    import tempfile

    folder = Path(tempfile.gettempdir()) / f"weft-bench-{shape}"
    if not (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        base(shape, "cuda").save_pretrained(folder)
        words = {chr(i + 256): i for i in range(256)} | {"<s>": 256, "</s>": 257, "<pad>": 258, "<unk>": 259}
        made = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return folder


def peers_step(model: Any, shape: str, kind: str) -> tuple[Any, Any]:
    """A peer's step: autocast, clipping, fused AdamW."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    static = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    given = []
    for b in batches(kind, SHAPES[shape]["vocab_size"], STEPS):  # short rows padded, as peft's users do
        width = max(b.lengths)
        ids, mask, labels = (torch.full((len(b.lengths), width), fill) for fill in (0, 0, -100))
        flat_ids, flat_targets, at = b.input_ids.flatten(), b.targets.flatten(), 0
        for i, n in enumerate(b.lengths):
            ids[i, :n], mask[i, :n] = flat_ids[at : at + n], 1
            labels[i, 1:n] = flat_targets[at : at + n - 1]
            at += n
        given.append({"input_ids": ids.cuda(), "labels": labels.cuda()} | ({} if kind == "full" else {"attention_mask": mask.cuda()}))

    def step(i: int) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**given[i]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step, {"static": static, "trainable": sum(p.numel() for p in parameters)}


def sustained() -> dict[str, float]:
    """TFLOP/s of a bf16 product over two seconds, and of its first fifth of a second."""
    import torch

    a = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16)

    def rate(seconds: float) -> float:
        torch.cuda.synchronize()
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            for _ in range(20):
                a @ b
            torch.cuda.synchronize()
            done += 20
        return done * 2 * 8192 * 4096 * 14336 / (time.perf_counter() - started) / 1e12

    return {"burst": rate(0.2), "sustained": rate(2.5)}


def alone(row: str, side: str, device: str, profile: bool) -> dict[str, Any]:
    """One row on one side, in this process."""
    if side == "unsloth":
        import unsloth  # noqa: F401 (it patches transformers, and wants to be first)
    import torch

    shape, fmt, memory, kind, method = ROWS[row] if row in ROWS else (row.split(":")[0], "bf16", float(row.split(":")[1]), "full", "LoRA")
    cuda = device == "cuda"
    began = time.perf_counter()
    if side == "weft":
        step, facts = weft_side(shape, fmt, memory, kind, method, device)
    elif side == "unsloth":
        step, facts = unsloth_side(shape, fmt, memory, kind, method)
    else:
        step, facts = peft_side(side, shape, fmt, memory, kind, method)
    built = time.perf_counter() - began
    first, losses = time.perf_counter(), []
    marks: list[Any] = []  # on a card the ends of the steps as the card sees them: a loop that trains does not wait for each
    for i in range(STEPS):
        losses.append(step(i))
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
        if cuda and i in (0, STEPS - 1):
            torch.cuda.synchronize()
        if i == 0:
            first = time.perf_counter() - first
    times = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in pairwise(marks)]
    from weft.step import peak_memory  # which also sees what lies in CUDA graphs; without any it is the allocator's figure

    most = peak_memory(torch.device("cuda")) if cuda else 0
    seconds = statistics.median(times[5:])
    ours = batches(kind, SHAPES[shape]["vocab_size"], 1)[0]
    parameters, attention = counts(shape)
    tokens = ours.n_tokens
    flops = 4 * parameters * tokens + (attention * tokens if kind == "full" else 0)
    result = {
        "row": row, "side": side, "tokens": tokens, "targets": ours.n_targets, "step_ms": seconds * 1e3, "tokens_per_s": tokens / seconds,
        "targets_per_s": ours.n_targets / seconds, "tflops": flops / seconds / 1e12, "first_loss": float(losses[0]),
        "loss": float(losses[-1]), "first_step_s": facts.get("prepare_s", 0.0) + first, "build_s": built,
        "peak_gb": max(most, facts.get("checking_peak", 0)) / 1e9 if cuda else None,
        "steps_peak_gb": most / 1e9 if cuda else None, "static_gb": facts["static"] / 1e9,
        "trainable": facts["trainable"], "path": facts.get("path"), "said": facts.get("said"),
        "times_ms": [round(t * 1e3, 1) for t in times],
    }  # fmt: skip
    if profile and cuda:
        result["kernels_ms"] = kernels(step)
    return result


def kernels(step: Any) -> dict[str, float]:
    """Milliseconds a step by kernel, the longest first."""
    import collections

    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        for i in range(3):
            step(i)
        torch.cuda.synchronize()
    total: collections.Counter[str] = collections.Counter()
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name[:90]] += event.device_time / 3e3
    return {"all": round(sum(total.values()), 1)} | {k: round(v, 2) for k, v in total.most_common(25)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--sides", nargs="*", default=list(SIDES))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--alone", nargs=2, metavar=("ROW", "SIDE"))
    parser.add_argument("--join", nargs="+", type=Path, help="put the rows of these results together")
    args = parser.parse_args()
    if args.join:
        join(args.join)
        return
    if args.alone:
        if args.alone[0] == "gemm":
            print("RESULT " + json.dumps(sustained()))
            return
        try:
            result = alone(*args.alone, args.device, args.profile)
        except Exception as e:  # one row's failure is a result, told as such
            told = f"{type(e).__name__}: {e}"[:600]
            result = {"row": args.alone[0], "side": args.alone[1], "error": told, "at": traceback.format_exc()[-900:]}
        print("RESULT " + json.dumps(result))
        return
    from _common import save

    began, rows = time.perf_counter(), []
    gemm = run("gemm", "", args)
    for row in args.rows:
        for side in args.sides:
            if missing := absent(side):
                rows.append({"row": row, "side": side, "error": f"{missing} is not installed"})
            elif side not in able(row):
                continue
            elif time.perf_counter() - began > args.seconds:
                rows.append({"row": row, "side": side, "error": "not run: out of time"})
            else:
                rows.append(run(row, side, args))
                if "tflops" in rows[-1] and "sustained" in gemm:
                    rows[-1]["share_of_limit"] = rows[-1]["tflops"] / gemm["sustained"]
            print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("times_ms", "kernels_ms")}), flush=True)
            if "kernels_ms" in rows[-1]:
                print(json.dumps(rows[-1]["kernels_ms"]), flush=True)
            save("train", {"gemm_tflops": gemm, "batch": f"{BATCH} x {LENGTH}", "rank": RANK, "rows": rows},
                 ("torch", "transformers", "peft", "liger_kernel", "triton"))  # fmt: skip


def able(row: str) -> tuple[str, ...]:
    """Who runs this row. Nobody else multiplies in fp8 or has a point between least memory and most speed; liger's patch is Llama's, and
    where it can be had peft is not measured without it; unsloth trains no factors on fused experts."""
    shape, fmt, memory, _, method = ROWS[row]
    if fmt == "fp8" or 0.2 < memory < 1:
        return ("weft",)
    if METHODS[method][2] is None:
        return ("weft",)
    if "MoE" in shape:
        return ("weft", "peft")
    if method not in ("LoRA", "DoRA", "rsLoRA"):
        return ("weft", "peft+liger")
    return ("weft", "unsloth", "peft") if fmt == "nf4" else ("weft", "unsloth", "peft+liger")


def join(files: list[Path]) -> None:
    """One result of several, in the order of ROWS. What a later file has takes an earlier one's place, and each row keeps its commit.

    weft and the best peer of a row must be of one file, since they are compared; all files of one kind of card and the same versions.
    """
    found = [json.loads(f.read_text()) for f in files]
    alike = ("versions", "batch", "rank")
    differ = [key for key in alike if any(f[key] != found[0][key] for f in found)]
    differ += ["the card"] * (len({f["machine"]["gpu"] for f in found}) > 1)
    if differ:
        raise SystemExit(f"these results differ in {', '.join(differ)}, and rows side by side must not")
    kept: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}
    for i, f in enumerate(found):
        for row in f["rows"]:
            if row["row"] not in ROWS:  # no longer measured, or by another name
                continue
            row.pop("at", None)  # where it failed: for whoever runs it
            kept[row["row"], row["side"]] = i, {"commit": f["commit"]} | row
    for name in ROWS:
        measured = {side: (i, r["tokens_per_s"]) for (row, side), (i, r) in kept.items() if row == name and "tokens_per_s" in r}
        peers = [m for side, m in measured.items() if side != "weft"]
        if peers and "weft" in measured and max(peers, key=lambda m: m[1])[0] != measured["weft"][0]:
            raise SystemExit(f"{name}: weft and the best peer are of different files")
    order = {row: i for i, row in enumerate(ROWS)}
    rows = sorted((r for _, r in kept.values()), key=lambda r: order[r["row"]])
    path = Path(__file__).parent / "results" / "train.json"
    note = next(({"note": f["note"]} for f in found if "note" in f), {})
    gemms = [g for f in found for g in (f["gemm_tflops"] if isinstance(f["gemm_tflops"], list) else [f["gemm_tflops"]])]
    path.write_text(json.dumps(found[-1] | note | {"gemm_tflops": gemms, "rows": rows}, indent=2) + "\n")
    print(path)


def run(row: str, side: str, args: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--alone", row, side, "--device", args.device] + ["--profile"] * args.profile
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("RESULT ")), end="", flush=True)
    result: dict[str, Any] = json.loads(found[-1][7:]) if found else {"row": row, "side": side, "error": done.stderr[-600:]}
    return result


def absent(side: str) -> str:
    needed = {"peft": ["peft"], "peft+liger": ["peft", "liger_kernel"], "unsloth": ["unsloth", "bitsandbytes"]}.get(side, [])
    return ", ".join(n for n in needed if importlib.util.find_spec(n) is None)


if __name__ == "__main__":
    main()
