"""Working with adapters, weft beside peft: attach, save, load, switch, a hundred at once, forward overhead, mixed rows, merge, import.

    python bench/adapters.py            (about three minutes; --quick leaves out peft's hundred adapters, which take it many minutes)

One process, one thread, one base: a Llama of 32 layers, hidden 256, intermediate 688, 224 linear layers, random weights. Every pair is
measured in the same run; ratios are what counts, since machines differ.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
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
from weft.adapters import attached

torch.set_num_threads(1)
RANK, MANY = 8, 100
ROWS: list[dict[str, Any]] = []


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=32, num_attention_heads=8, num_key_value_heads=8,
        tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def row(what: str, ours: float, theirs: float | None, unit: str, aim: str, met: bool | None) -> None:
    ROWS.append(
        {"what": what, "weft": ours, "peft": theirs, "unit": unit, "times_less": theirs / ours if theirs else None, "aim": aim, "met": met}
    )
    print(f"{what:58} weft {ours:9.4g}  peft {theirs if theirs is None else round(theirs, 4)!s:>9} {unit}", flush=True)


def jolt(params: Any, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in params:
            p.add_(0.02 * torch.randn_like(p))


def fifth(what: str, ours: float, theirs: float) -> None:
    row(what, ours * 1e3, theirs * 1e3, "ms", "5 times less", theirs / ours >= 5)


def main(quick: bool) -> None:
    lora = weft.LoRA(rank=RANK, alpha=RANK)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    pristine = base()
    fresh: dict[str, Any] = {}

    def renew() -> None:
        fresh["model"] = copy.deepcopy(pristine)

    ours_attach = timed(lambda: weft.adapt(fresh["model"], lora), before=renew)
    theirs_attach = timed(lambda: peft.get_peft_model(fresh["model"], config), before=renew, repeat=3)
    fifth("attach LoRA to 224 linear layers", ours_attach, theirs_attach)

    ours = weft.adapt(copy.deepcopy(pristine), lora)
    theirs = peft.get_peft_model(copy.deepcopy(pristine), config).eval()
    jolt(p for p in ours.parameters() if p.requires_grad)
    folder = Path(tempfile.mkdtemp())
    fifth("save", timed(lambda: weft.save(ours, folder / "ours")), timed(lambda: theirs.save_pretrained(folder / "theirs"), repeat=5))

    count = iter(range(1000))
    load_ours = timed(lambda: weft.load(ours, folder / "ours", name=f"more{next(count)}"), repeat=3)
    load_theirs = timed(lambda: theirs.load_adapter(folder / "theirs", adapter_name=f"more{next(count)}"), repeat=3)
    fifth("load a second, third, fourth adapter", load_ours, load_theirs)

    names_ours, names_theirs = weft.adapters.names(ours)[:2], list(theirs.peft_config)[:2]
    flip = {"i": 0}

    def other(names: list[str]) -> str:
        flip["i"] ^= 1
        return names[flip["i"]]

    fifth(
        "switch the active adapter",
        timed(lambda: weft.use(ours, other(names_ours))),
        timed(lambda: theirs.set_adapter(other(names_theirs))),
    )

    for batch, length in ((1, 1), (1, 32), (8, 32)):
        ids = torch.randint(3, 500, (batch, length))
        weft.use(ours, names_ours[0])
        theirs.set_adapter(names_theirs[0])
        with torch.no_grad():
            t = interleaved(
                {"base": lambda: pristine(ids), "weft": lambda: ours(ids), "peft": lambda: theirs(ids)}, repeat=31 if length == 1 else 11
            )
        over, over_peft = t["weft"] / t["base"], t["peft"] / t["base"]
        row(f"forward with LoRA over the bare base, {batch} × {length} tokens", over, over_peft, "×", "under × 1.25", over < 1.25)

    mixed_ours, mixed_theirs = copy.deepcopy(pristine), peft.get_peft_model(copy.deepcopy(pristine), config, adapter_name="a0").eval()
    for i in range(8):
        weft.adapt(mixed_ours, lora, name=f"a{i}")
        jolt((p for a in attached(mixed_ours, f"a{i}").values() for p in a.parameters()), seed=i)
        if i:
            mixed_theirs.add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(8)]
    for length in (1, 32):
        ids = torch.randint(3, 500, (8, length))
        with torch.no_grad():
            weft.use(mixed_ours, "a0")
            one = interleaved({"weft": lambda: mixed_ours(ids), "peft": lambda: mixed_theirs(ids)}, repeat=9)
            theirs_mixed = timed(lambda: mixed_theirs(ids, adapter_names=names), repeat=5)
            with weft.rows(mixed_ours, names):
                ours_mixed = timed(lambda: mixed_ours(ids), repeat=9)
        over, over_peft = ours_mixed / one["weft"], theirs_mixed / one["peft"]
        row(f"8 rows, 8 adapters over one adapter, {length} tokens each", over, over_peft, "×", "under × 1.25", over < 1.25)

    weft.use(ours, names_ours[0])
    for what, keep in (("merge for good", False), ("merge, base kept for unmerge", True)):
        state: dict[str, Any] = {}

        def again(state: dict[str, Any] = state) -> None:
            state["ours"] = weft.adapt(copy.deepcopy(pristine), lora)
            state["theirs"] = peft.get_peft_model(copy.deepcopy(pristine), config)

        m_ours = timed(lambda keep=keep, state=state: weft.merge(state["ours"], keep=keep), before=again, repeat=5)
        m_theirs = timed(
            lambda keep=keep, state=state: state["theirs"].merge_adapter() if keep else state["theirs"].merge_and_unload(),
            before=again,
            repeat=5,
        )
        fifth(what, m_ours, m_theirs)

    hundred = copy.deepcopy(pristine)
    ours_each = [_seconds(lambda i=i: weft.adapt(hundred, lora, name=f"n{i}")) for i in range(MANY)]
    theirs_each: list[float] = []
    if not quick:
        many = peft.get_peft_model(copy.deepcopy(pristine), config, adapter_name="n0")
        theirs_each = [_seconds(lambda i=i: many.add_adapter(f"n{i}", config)) for i in range(1, MANY)]
    row(
        f"{MANY} adapters attached one after another",
        sum(ours_each),
        sum(theirs_each) or None,
        "s",
        "5 times less",
        sum(theirs_each) / sum(ours_each) >= 5 if theirs_each else None,
    )
    growth = statistics.median(ours_each[-5:]) / statistics.median(ours_each[:5])
    growth_peft = statistics.median(theirs_each[-5:]) / statistics.median(theirs_each[:5]) if theirs_each else None
    row("  the last five over the first five", growth, growth_peft, "×", "no growth (under × 1.5)", growth < 1.5)
    row(f"  switch with {MANY} attached", timed(lambda: weft.use(hundred, other(["n0", "n1"]))) * 1e3, None, "ms", "-", None)

    imports = {}
    for name, code in {"weft": "import weft; weft.adapt, weft.LoRA, weft.save", "peft": "import peft"}.items():
        whole = f"import torch, time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
        runs = [subprocess.run([sys.executable, "-c", whole], check=True, capture_output=True, text=True).stdout for _ in range(5)]
        imports[name] = statistics.median(map(float, runs))
    gap, gap_peft = imports["weft"], imports["peft"]
    row("import, beyond torch's own", gap, gap_peft, "s", "under 0.2 s", gap < 0.2)

    table = Table("", "weft", "peft 0.21.2", "times less", "aim", "")
    for r in ROWS:
        less = f"{r['times_less']:.1f}" if r["times_less"] and r["unit"] != "×" else ""
        theirs_text = f"{r['peft']:.3g} {r['unit']}" if r["peft"] is not None else "not run"
        table.add_row(
            r["what"], f"{r['weft']:.3g} {r['unit']}", theirs_text, less, r["aim"], {True: "met", False: "missed", None: ""}[r["met"]]
        )
    Console(width=150).print(table)
    print(save("adapters", {"rows": ROWS, "base": "Llama, 32 layers, hidden 256, 224 linear layers, rank 8", "quick": quick}))


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main("--quick" in sys.argv)
