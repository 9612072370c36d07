"""Making one adapter of two, weft beside peft: every way of `combine`, and the same arithmetic as peft's by weft's factors.

    python bench/combine.py            (about three minutes)

One process, one thread: a Llama of 32 layers, hidden 256, intermediate 688, with LoRA of rank 8 on its 225 linear layers, the head too.
weft prunes ΔW itself, which peft does under the names that end in `_svd`: those are what it is measured against.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

import peft
import torch
from _common import save, timed
from adapters import base
from rich.console import Console
from rich.table import Table

import weft
from weft.adapters import attached
from weft.adapters.combine_factors import combine_factors

torch.set_num_threads(1)
RANK, DENSITY = 8, 0.5
# weft's way, peft's name for what it computes or comes nearest to, and whether it prunes
WAYS: list[tuple[Any, Any, bool]] = [
    ("linear", "linear", False), ("cat", "cat", False), ("svd", "svd", False), ("ties", "ties_svd", True),
    ("magnitude_prune", "magnitude_prune_svd", True), ("dare_linear", "dare_linear_svd", True), ("dare_ties", "dare_ties_svd", True),
]  # fmt: skip


def main() -> None:
    ours = base()
    targets = sorted({n.rpartition(".")[2] for n, m in ours.named_modules() if isinstance(m, torch.nn.Linear)})
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    theirs: Any = peft.get_peft_model(base(), config, adapter_name="x").eval()
    theirs.add_adapter("y", config)
    for name in "xy":
        weft.adapt(ours, weft.LoRA(rank=RANK, alpha=RANK, targets=targets), name)
    layers = dict(theirs.base_model.model.named_modules())
    torch.manual_seed(1)
    with torch.no_grad():
        for name in "xy":
            for path, part in attached(ours, name).items():
                for mine, its in ((part.A, layers[path].lora_A[name]), (part.B, layers[path].lora_B[name])):
                    mine.copy_(0.1 * torch.randn_like(mine))
                    its.weight.copy_(mine)
    wanted = {
        p: sum(0.5 * (layers[p].scaling[n] * layers[p].lora_B[n].weight @ layers[p].lora_A[n].weight) for n in "xy")
        for p in attached(ours, "x")
    }

    def error(name: str) -> tuple[float, float]:
        """‖Σ wΔW − the result's ΔW‖ over ‖Σ wΔW‖, over all layers, of weft's and of peft's."""
        lost = [0.0, 0.0]
        for path, part in attached(ours, name).items():
            lost[0] += float((part.scale * part.B @ part.A - wanted[path]).square().sum())
            lost[1] += float((layers[path].get_delta_weight(name) - wanted[path]).square().sum())
        whole = sum(float(w.square().sum()) for w in wanted.values())
        return (lost[0] / whole) ** 0.5, (lost[1] / whole) ** 0.5

    rows: list[dict[str, Any]] = []
    for how, its, prunes in WAYS:
        more: dict[str, Any] = {"density": DENSITY} if prunes else {}

        def anew() -> None:
            for name in ("mine", "factors"):
                if name in weft.adapters.names(ours):
                    weft.remove(ours, name)
            if "mine" in theirs.peft_config:
                theirs.delete_adapter("mine")

        mine = timed(lambda: weft.combine(ours, {"x": 0.5, "y": 0.5}, "mine", how, **more), repeat=3, before=anew)
        face = timed(lambda: combine_factors(ours, ["x", "y"], [0.5, 0.5], "factors", its, **more), repeat=3, before=anew)
        anew()
        weft.combine(ours, {"x": 0.5, "y": 0.5}, "mine", how, **more)
        slow = timed(
            lambda: theirs.add_weighted_adapter(["x", "y"], [0.5, 0.5], "mine", its, **more),
            repeat=2,
            before=lambda: theirs.delete_adapter("mine") if "mine" in theirs.peft_config else None,
            warm=0,
        )
        off, off_peft = error("mine") if not prunes else (None, None)
        rows.append(
            {"how": how, "peft_name": its, "weft_s": mine, "face_s": face, "peft_s": slow, "weft_error": off, "peft_error": off_peft}
        )
        print(rows[-1], flush=True)

    table = Table("", "weft.combine", "peft's arithmetic by weft", "peft", "error, weft", "error, peft")
    for r in rows:
        errors = [f"{e:.2g}" if e is not None else "-" for e in (r["weft_error"], r["peft_error"])]
        table.add_row(r["how"], f"{r['weft_s']:.2f} s", f"{r['face_s']:.2f} s", f"{r['peft_s']:.2f} s", *errors)
    Console(width=120).print(table)
    print(
        save(
            "combine",
            {
                "rows": rows,
                "base": f"Llama, 32 layers, hidden 256, {len(wanted)} linear layers, two adapters of rank {RANK}, density {DENSITY}",
            },
        )
    )


if __name__ == "__main__":
    main()
