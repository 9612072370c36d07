"""Writes bench/results/base.json from what `tokens.py`, `pretrain.py` and `probe.py` left: the figures of the packaged base.

    python report.py --training MODEL/training.json [POLISHED/training.json] --tokens TOKENS --probe PROBE.json [--cpu PROBE.json ...]

The held-out figures are computed here, from the packaged weights in fp32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
from pathlib import Path

import pretrain
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "src" / "weft" / "models" / "embedded"
PROMPTS = ["The purpose of this module is", "If the file does not exist,", "When an exception occurs", "A context manager", "Return a list of", "The server", "def read_file(path):\n"]
ASKED = ["What is a socket?", "Explain list.append.", "Reverse the order of the words: one old red lamp", "Put into the past tense: The parser reads the file.",
         "Write as JSON: name: Ada; age: 12"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", type=Path, nargs="+", required=True, help="training.json of every stage, in order")
    parser.add_argument("--tokens", type=Path, required=True, help="the folder that tokens.py wrote, for the held-out sets")
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--cpu", type=Path, nargs="*", default=[], help="probes run on a CPU, for their seconds")
    args = parser.parse_args()
    stages = [json.loads(p.read_text()) for p in args.training]
    probe, corpus = (json.loads(p.read_text()) for p in (args.probe, args.tokens / "corpus.json"))
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    data = pretrain.Data(args.tokens / "tokens.npz", stages[0]["recipe"], "cpu")
    held_out = pretrain.measure(model, data, corpus["counts"], 10**9, ("held_out",)) | {"skills_right": pretrain.answers_right(model, data, 10**9)}
    text = (ROOT / "tests" / "base" / "piece.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids
    nats = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    torch.manual_seed(0)
    samples = []
    for prompt in PROMPTS:
        out = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9)
        samples.append({"prompt": prompt, "text": tokenizer.decode(out[0], skip_special_tokens=True)})
    for question in ASKED:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**chat, max_new_tokens=60)
        samples.append({"user": question, "assistant": tokenizer.decode(out[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)})
    best = {}
    for r in probe:
        key = f"{r['task']} {r['method']}"
        if key not in best or r["held_out_loss"] < best[key]["held_out_loss"]:
            best[key] = {k: v for k, v in r.items() if k not in ("device", "threads", "seed")}
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": f"written on {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "pythons": corpus["pythons"]},
        "parameters": stages[0]["parameters"],
        "held_out": held_out,
        "corpus": corpus,
        "stages": [{k: s[k] for k in ("machine", "torch", "steps", "tokens", "seconds", "recipe", "history")} for s in stages],
        "piece": {"file": "tests/base/piece.txt", "bits_per_byte": nats / math.log(2) / len(text.encode())},
        "probe": {"best": best, "all": probe, "cpu": [r for p in args.cpu for r in json.loads(p.read_text())]}, "samples": samples,
    }
    (ROOT / "bench" / "results").mkdir(exist_ok=True)
    (ROOT / "bench" / "results" / "base.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for s in samples:
        print("-", " => ".join(map(repr, s.values())))


if __name__ == "__main__":
    main()
