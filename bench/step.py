"""One training step, weft beside peft, on the embedded base: the same rows, the same LoRA, the same torch settings, one process.

    python bench/step.py [--device cuda] [--threads 2]

Two kinds of work: chat rows whose prompts bear no loss (weft packs them and runs the head for answers only; peft gets the usual padded
batch of the same rows and transformers' own loss), and full rows in which every token bears loss (the same batch for both). A third step is
weft's with the last layer whole (`weft.step.elide`), which tells what leaving out its work at masked tokens gives. The base is
in fp32 on a CPU and in bf16 on a card. Peak memory is the allocator's on CUDA and the process's on a CPU, where each side is measured
in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

import torch
from _common import interleaved, save

TOKENS, RANK, LR = 1024, 8, 1e-3


def data(kind: str, tokenizer: Any) -> tuple[Any, Any]:
    """(weft's batch, peft's batch as keyword arguments) of the same rows."""
    from weft.data import Batches, DataConfig, demo, load_rows, pack, prepare

    with tempfile.TemporaryDirectory() as folder:
        path, _ = demo.write("dates", folder, train=400, held_out=1)
        examples = prepare(load_rows(str(path)), tokenizer, DataConfig(train=str(path)), progress=False).examples
    if kind == "masked rows":
        ours = Batches(examples, TOKENS, packing=True, seed=0).epoch(0)[0]
        bounds = ours.cu_seqlens.tolist()
        rows = [ours.input_ids[0, a:b] for a, b in pairwise(bounds)]
        targets = [ours.targets[0, a:b] for a, b in pairwise(bounds)]
    else:
        torch.manual_seed(0)
        rows = [torch.randint(10, 1000, (256,)) for _ in range(TOKENS // 256)]
        targets = [torch.cat([row[1:], torch.tensor([-100])]) for row in rows]
        bears = [torch.arange(256) > 0 for _ in rows]
        from weft.data import Example

        ours = pack(
            [Example(ids=r.numpy().astype("int32"), bears=b.numpy(), row=i) for i, (r, b) in enumerate(zip(rows, bears, strict=True))]
        )
    width = max(map(len, rows))
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, 1 : len(row)] = target[:-1]  # transformers shifts labels itself
    assert int((labels != -100).sum()) == ours.n_targets
    return ours, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def weft_step(batch: Any, device: str, whole: bool = False) -> Any:
    import weft
    from weft.models import attention
    from weft.step import prepare
    from weft.train.flat import AdamW, Flat

    torch.manual_seed(0)
    model = weft.load_base("embedded", base="fp32" if device == "cpu" else "bf16", device=device)
    attention.use(model)
    weft.adapt(model, weft.LoRA(rank=RANK, alpha=16)).train()
    parameters = weft.adapters.trainable(model, "default")
    flat = Flat(parameters, scale=lambda name: 1.0)
    optimiser = AdamW(flat, (0.9, 0.999), 1e-8, 0.0)
    batch = batch.to(device)
    fast = prepare(model, batch, parameters, varying=False)
    if whole:
        fast.tail = []

    def step() -> float:
        loss = fast.loss(batch) / batch.n_targets
        loss.backward()
        flat.clip(1.0)
        optimiser.step(LR)
        flat.zero_grad()
        return loss.item()

    return step


def peft_step(batch: dict[str, Any], device: str) -> Any:
    import peft

    import weft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(weft.load_base("embedded", base="fp32" if device == "cpu" else "bf16", device=device), config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    batch = {k: v.to(device) for k, v in batch.items()}

    def step() -> float:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def alone(side: str, kind: str, device: str, threads: int) -> dict[str, float]:
    """Peak memory of twenty steps in a process of its own, over what it had before the first."""
    import weft
    from weft.step import peak_memory, reset_peak_memory

    torch.set_num_threads(threads)
    ours, theirs = data(kind, weft.load_tokenizer("embedded"))
    step = weft_step(ours, device) if side == "weft" else peft_step(theirs, device)
    if device == "cuda":
        reset_peak_memory(torch.device("cuda"))
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    losses = [step() for _ in range(20)]
    peak = peak_memory(torch.device("cuda")) / 2**20 if device == "cuda" else _resident_peak()
    return {"peak_mib": peak, "first_loss": losses[0], "last_loss": losses[-1]}


def _resident_peak() -> float:
    """MiB that the process held at most since the peak was reset."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", nargs=2, metavar=("SIDE", "KIND"))
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(alone(*args.alone, args.device, args.threads)))
        return
    import weft

    torch.set_num_threads(args.threads)
    tokenizer, rows = weft.load_tokenizer("embedded"), []
    for kind in ("masked rows", "full rows"):
        ours, theirs = data(kind, tokenizer)
        steps = {"weft": weft_step(ours, args.device), "peft": peft_step(theirs, args.device), "whole": weft_step(ours, args.device, True)}
        seconds = interleaved(steps, repeat=25, warm=3)
        command = [sys.executable, __file__, "--device", args.device, "--threads", str(args.threads), "--alone"]
        memory = {
            side: json.loads(subprocess.run([*command, side, kind], capture_output=True, text=True, check=True).stdout)
            for side in ("weft", "peft")
        }
        rows.append({
            "work": kind, "tokens": int(ours.n_tokens), "padded_tokens": int(theirs["input_ids"].numel()), "targets": ours.n_targets,
            "weft_ms": seconds["weft"] * 1e3, "peft_ms": seconds["peft"] * 1e3, "faster": seconds["peft"] / seconds["weft"],
            "whole_last_layer_ms": seconds["whole"] * 1e3, "elision": seconds["whole"] / seconds["weft"],
            "weft_peak_mib": memory["weft"]["peak_mib"], "peft_peak_mib": memory["peft"]["peak_mib"],
            "first_loss": [memory["weft"]["first_loss"], memory["peft"]["first_loss"]],
        })  # fmt: skip
        print(json.dumps(rows[-1], indent=2), flush=True)
    print(save("step" if args.device == "cpu" else "step_gpu", {"rank": RANK, "rows": rows}))


if __name__ == "__main__":
    main()
