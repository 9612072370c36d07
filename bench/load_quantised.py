"""A bf16 checkpoint into nf4 with double quantisation: seconds and peaks, weft beside transformers with bitsandbytes, a process each.

    python bench/load_quantised.py                              # 8B Llama shape, 16 GB of random weights on the disk
    python bench/load_quantised.py --layers 4 --device cpu      # the same layers, fewer of them: 3.8 GB

Without bitsandbytes weft runs alone.

Host peak: of what the process holds in memory of its own (RssAnon, sampled), without pages of files, which the system may drop; and of
both (RssAnon and RssFile). On a CPU transformers leaves what it does not pack in pages of the file. Seconds: elapsed, and of processors.
Device peak: the allocator's. Both readers find the file in the system's cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import _common


def write(folder: Path, layers: int, hidden: int) -> None:
    """Random weights of Llama-3.1-8B's shape, a shard a layer, without ever holding the model."""
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=max(hidden // 512, 1), tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    groups: dict[str, dict[str, torch.Size]] = {}
    for key, shape in shapes.items():
        groups.setdefault(key.split(".")[2] if ".layers." in key else key, {})[key] = shape
    names, place = {}, "cuda" if torch.cuda.is_available() else "cpu"
    for i, group in enumerate(groups.values()):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        made = {k: torch.empty(s, dtype=torch.bfloat16, device=place).normal_(0, 0.02).cpu() for k, s in group.items()}
        save_file(made, folder / file, {"format": "pt"})
        names |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def load(who: str, folder: str, device: str) -> None:
    """The child: prints its figures as JSON."""
    import weft

    peak, both, over = [0], [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            status = Path("/proc/self/status").read_text()
            anon, file = (int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
            peak[0], both[0] = max(peak[0], anon), max(both[0], anon + file)

    import_module("transformers.models.llama.modeling_llama")  # importing is not loading, and takes longer on a cold disk

    weft.load_base, transformers.AutoModelForCausalLM  # noqa: B018  (both are imported by asking for them)
    if who == "transformers":
        import bitsandbytes  # noqa: F401
    torch.empty(1, device=device)
    threading.Thread(target=watch, daemon=True).start()
    time.sleep(0.05)
    before, start, worked = (peak[0], both[0]), time.perf_counter(), time.process_time()
    if who == "weft":
        model = weft.load_base(folder, "nf4", device)
    else:
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16, device_map=device)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    over.set()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    figures = {
        "seconds": seconds, "processor_seconds": worked, "host_peak_bytes": peak[0] - before[0],
        "host_peak_with_file_pages_bytes": both[0] - before[1], "parameter_bytes": held, "other_dtype": str(model.dtype),
    }  # fmt: skip
    if device != "cpu":
        figures["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    print("FIGURES " + json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=2, help="of each, by turns; the fastest counts")
    parser.add_argument("--name", default="load_quantised")
    parser.add_argument("--child", nargs=2, metavar=("WHO", "FOLDER"))
    args = parser.parse_args()
    if args.child:
        load(*args.child, args.device)
        return
    folder = Path(tempfile.mkdtemp(prefix="weft-bench-"))
    try:
        write(folder, args.layers, args.hidden)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        result: dict[str, object] = {
            "what": "bf16 to nf4 with double quantisation", "layers": args.layers, "hidden": args.hidden, "device": args.device,
            "file_bytes": size, "parameters": size // 2,
        }  # fmt: skip
        peer = importlib.util.find_spec("bitsandbytes") is not None
        runs: dict[str, list[dict[str, Any]]] = {"weft": [], "transformers": []} if peer else {"weft": []}
        for _ in range(args.repeat):
            for who, found in runs.items():
                words = [sys.executable, __file__, "--device", args.device, "--child", who, str(folder)]
                ran = subprocess.run(words, capture_output=True, text=True)
                line = next((x for x in ran.stdout.splitlines() if x.startswith("FIGURES ")), None)
                found.append(json.loads(line[8:]) if line else {"failed": ran.stderr.strip().splitlines()[-1:]})
                print(who, found[-1], flush=True)
        for who, found in runs.items():
            whole = [f for f in found if "failed" not in f]
            result[who] = min(whole, key=lambda f: f["seconds"]) | {"seconds_of_runs": [f["seconds"] for f in whole]} if whole else found[0]
        if not peer:
            result["transformers"] = {"left_out": "bitsandbytes is not installed"}
            print("transformers with bitsandbytes: left out, bitsandbytes is not installed")
    finally:
        shutil.rmtree(folder)
    print(_common.save(args.name, result, ("torch", "transformers", "bitsandbytes")))


if __name__ == "__main__":
    main()
