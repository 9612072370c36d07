"""What every method costs over the bare base, weft beside peft: a forward pass, a training step, attaching, loading, switching.

    python bench/methods.py             (about two minutes; --quick for one round of everything, to see that it runs)

One process, one thread, one base: a Llama of 8 layers, hidden 256, random weights, 4 rows of 64 tokens. Times of one round are taken one
after another, base, weft and peft, so that a noisy machine treats them alike; ratios over the base are what counts.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

import peft
import torch
import transformers
from _common import interleaved, save, timed
from rich.console import Console
from rich.table import Table

import weft

torch.set_num_threads(1)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = 5  # the first token of every row, so that an activated LoRA works on all of it
TASK = dict(task_type="CAUSAL_LM")
# fmt: off
METHODS: dict[str, tuple[weft.Method, Any]] = {  # peft's None: it has no such method
    "LoRA": (weft.LoRA(rank=8), peft.LoraConfig(r=8, lora_alpha=32, target_modules=ALL, **TASK)),
    "DoRA": (weft.DoRA(rank=8), peft.LoraConfig(r=8, lora_alpha=32, use_dora=True, target_modules=ALL, **TASK)),
    "ALoRA": (weft.ALoRA(rank=8, invocation_tokens=(INVOCATION,)),
              peft.LoraConfig(r=8, lora_alpha=32, alora_invocation_tokens=[INVOCATION], target_modules=ALL, **TASK)),
    "AdaLoRA": (weft.AdaLoRA(), peft.AdaLoraConfig(target_modules=ALL, total_step=1000, **TASK)),
    "VeRA": (weft.VeRA(rank=64, targets=("o_proj", "q_proj")), peft.VeraConfig(r=64, target_modules=["o_proj", "q_proj"], **TASK)),
    "IA3": (weft.IA3(), peft.IA3Config(**TASK)),
    "BitFit": (weft.BitFit(add=True), None),
    "TrainableTokens": (weft.TrainableTokens(tokens=(1, 2, 3)), peft.TrainableTokensConfig(token_indices=[1, 2, 3], **TASK)),
    "LNTuning": (weft.LNTuning(), peft.LNTuningConfig(**TASK)),
    "LoHa": (weft.LoHa(), peft.LoHaConfig(target_modules=ALL, **TASK)),
    "LoKr": (weft.LoKr(), peft.LoKrConfig(target_modules=ALL, **TASK)),
    "OFT": (weft.OFT(), peft.OFTConfig(target_modules=ALL, **TASK)),
    "Bottleneck": (weft.Bottleneck(), None),
    "PromptTuning": (weft.PromptTuning(tokens=16), peft.PromptTuningConfig(num_virtual_tokens=16, **TASK)),
    "PrefixTuning": (weft.PrefixTuning(tokens=16), peft.PrefixTuningConfig(num_virtual_tokens=16, **TASK)),
    "Subspace": (weft.Subspace(), None),
    "Full": (weft.Full(), None),
}
# fmt: on


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def forward(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def work() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    return work


def step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def work() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for p in model.parameters():
            p.grad = None

    return work


def measure(method: weft.Method, config: Any, pristine: Any, ids: torch.Tensor, repeat: int) -> dict[str, Any]:
    """Milliseconds of the base and ratios over it; attach, load and switch in milliseconds."""
    fresh: dict[str, Any] = {}

    def renew() -> None:
        fresh["model"] = copy.deepcopy(pristine)

    small = max(1, repeat // 4)
    row: dict[str, Any] = {"attach": {"weft": timed(lambda: weft.adapt(fresh["model"], method), small, renew, 1)}}
    models = {"weft": weft.adapt(copy.deepcopy(pristine), method)}
    folder = Path(tempfile.mkdtemp())
    weft.save(models["weft"], folder / "weft")
    row["load"] = {"weft": timed(lambda: weft.load(fresh["model"], folder / "weft"), small, renew, 1)}
    weft.adapt(models["weft"], method, name="other")
    row["switch"] = {"weft": timed(_switch(lambda name: weft.use(models["weft"], name)), repeat)}
    weft.remove(models["weft"], "other")
    weft.use(models["weft"], "default")
    if config is not None:
        row["attach"]["peft"] = timed(lambda: peft.get_peft_model(fresh["model"], config), small, renew, 1)
        models["peft"] = peft.get_peft_model(copy.deepcopy(pristine), config).eval()
        models["peft"].save_pretrained(folder / "peft")
        row["load"]["peft"] = timed(lambda: peft.PeftModel.from_pretrained(fresh["model"], folder / "peft"), small, renew, 1)
        try:
            models["peft"].add_adapter("other", config)
            row["switch"]["peft"] = timed(_switch(models["peft"].set_adapter), repeat)
            models["peft"].delete_adapter("other")
        except ValueError:  # peft refuses a second adapter of some methods
            row["switch"]["peft"] = None
            models["peft"] = peft.get_peft_model(copy.deepcopy(pristine), config).eval()
        models["peft"].set_adapter("default")
    for what, work in (("token", forward), ("forward", forward), ("step", step)):
        many, ids_now = (3, ids[:1, :1]) if what == "token" else (1, ids)
        bare = copy.deepcopy(pristine)
        if what == "step":  # the bare base's step is full fine-tuning's: forward, and gradients of every weight
            bare.requires_grad_(True)
            for model in models.values():
                model.train()
        works = {"base": work(bare, ids_now)} | {n: work(m, ids_now) for n, m in models.items()}
        times = interleaved(works, repeat * many, 2 if repeat > 1 else 0)
        row[what] = {name: t / times["base"] for name, t in times.items() if name != "base"} | {"base_ms": times["base"] * 1e3}
    return row


def _switch(use: Callable[[str], Any]) -> Callable[[], None]:
    def work() -> None:
        use("other")
        use("default")

    return work


def main(quick: bool) -> None:
    pristine, repeat = base(), 1 if quick else 9
    ids = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = INVOCATION
    rows = {}
    columns = ("one token ×", "forward ×", "step ×", "attach ms", "load ms", "switch ms")
    table = Table("", *(f"{what}, {who}" for what in columns for who in ("weft", "peft")))
    for name, (method, config) in METHODS.items():
        rows[name] = measure(method, config, pristine, ids, repeat)
        cells = []
        for what in ("token", "forward", "step", "attach", "load", "switch"):
            for who in ("weft", "peft"):
                value, factor = rows[name][what].get(who), 1 if what in ("token", "forward", "step") else 1e3
                cells.append("-" if value is None else f"{value * factor:.3g}")
        table.add_row(name, *cells)
        print(name, *cells, flush=True)
    Console(width=200).print(table)
    if not quick:
        what = "Llama, 8 layers, hidden 256, 4 rows of 64 tokens (or one token of one row); a step of the base is full fine-tuning's"
        print(save("methods", {"rows": rows, "base": what}))


if __name__ == "__main__":
    main("--quick" in sys.argv)
