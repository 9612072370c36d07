"""The README's tables and picture, made from the committed results. No number is typed into the README by hand.

`python bench/readme.py` writes the blocks between `<!-- bench:NAME -->` and `<!-- /bench -->` in README.md anew, and the picture if it is
not up to date; with `--check` it only says whether they are (exit code 1: they are not).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import plots

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PICTURE, PICTURED = ROOT / "docs" / "figures" / "train.svg", ROOT / "bench" / "results" / "train.json"
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.S)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [head, [":---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: float | None, unit: str = "") -> str:
    """Three digits and the unit; a ratio with the sign in front."""
    if value is None:
        return "not run"
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"× {text}" if unit == "×" else f"{text} {unit}".strip()


def origin(result: dict[str, Any], path: Path, command: str) -> str:
    """The line below a table: when, at which commit, on which machine, with which versions, and how to make it again."""
    machine, versions = result.get("machine", {}), result.get("versions", {})
    if isinstance(machine, dict):
        counts = [f"{machine[key]} {key}" for key in ("cores", "threads") if machine.get(key)]
        machine = ", ".join(p for p in (machine.get("gpu"), machine.get("cpu"), *counts) if p)
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if isinstance(version, str))
    made = f"{result['date']}, commit {result['commit']}; {machine}" + (f"; {listed}" if listed else "")
    return f"*{made}. From [`{path.relative_to(ROOT)}`]({path.relative_to(ROOT)}), made by `{command}`.*"


def adapters(result: dict[str, Any]) -> str:
    met = {True: "met", False: "**missed**", None: ""}
    rows = []
    for r in result["rows"]:
        less = f"{r['times_less']:.1f}" if r.get("times_less") and r["unit"] != "×" and r["weft"] > 0 else ""
        rows.append([r["what"].strip(), figure(r["weft"], r["unit"]), figure(r["peft"], r["unit"]), less, r["aim"], met[r["met"]]])
    text = table(["", "weft", f"peft {result['versions'].get('peft', '')}".strip(), "times less", "aim", ""], rows)
    note = "\n\nA quick run: peft's hundred adapters, which take minutes, were left out." if result.get("quick") else ""
    return f"Base: {result['base']}.\n\n{text}{note}"


def step(result: dict[str, Any]) -> str:
    rows = [
        [r["work"], str(r["tokens"]), str(r["targets"]), figure(r["weft_ms"], "ms"), figure(r["peft_ms"], "ms"), f"× {r['faster']:.2f}",
         *(figure(r[side], "MiB") if r[side] > 0 else "not known" for side in ("weft_peak_mib", "peft_peak_mib"))]
        for r in result["rows"]
    ]  # fmt: skip
    head = ["one training step", "tokens", "that bear loss", "weft", "peft", "faster", "peak memory, weft", "peft"]
    return f"LoRA of rank {result['rank']} on the embedded base.\n\n{table(head, rows)}"


def demo(result: dict[str, Any]) -> str:
    from weft.cli.demo_runs import best  # loads torch, so only where there is a sweep

    rows = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in result["runs"]):
        b = best(result, task, method)
        rate = f"{b['lr']:.3g}" + ("" if b["interior"] else " (edge of the grid)")
        match = f"{b['exact_match']:.1%}" + (f" ± {100 * b['spread']:.1f}" if b["seeds"] > 1 else "")
        losses = (f"{b['train_loss']:.4f}", f"{b['eval_loss']:.4f}")
        size = f"{b['adapter_bytes'] / 1e3:,.0f} kB"
        cells = [f"{task}, {method}", f"{b['parameters']:,}", rate, *losses, match, str(b["seeds"]), size]
        rows.append((task, b["parameters"], cells))
    order = list(dict.fromkeys(task for task, _, _ in rows))
    rows.sort(key=lambda r: (order.index(r[0]), r[1]))
    head = ["task, method", "trained parameters", "its best learning rate", "train loss", "held-out loss", "exact match", "seeds", "file"]
    note = "" if result.get("complete", True) else "\n\nThe sweep was stopped before its end."
    setup = result.get("setup", {})
    steps = f"{setup['steps']} steps of {setup['tokens_a_step']} tokens" if {"steps", "tokens_a_step"} <= set(setup) else "The same work"
    said = f"{steps} for every row, each at the rate where its held-out loss was lowest. Loss in nats a token; exact match on held-out rows"
    return f"{said}, ± one standard deviation over seeds.\n\n{table(head, [cells for _, _, cells in rows])}{note}"


def base(result: dict[str, Any]) -> str:
    kinds = {k: v for k, v in result["held_out"].items() if isinstance(v, dict)}
    rows = [[k, f"{v['held_out_bits_per_byte']:.2f}"] for k, v in kinds.items()]
    seen = sum(stage["tokens"] for stage in result["stages"]) / 1e6
    size = f"{result['parameters'] / 1e6:.1f} million parameters"
    said = f"{size}, trained from nothing on {seen:,.0f} million tokens. Held-out files, bits per byte."
    return f"{said}\n\n{table(['text', 'held out'], rows)}"


def train(result: dict[str, Any]) -> str:
    rows = []
    for r in sorted(result["rows"], key=lambda r: (r["row"], r["side"] != "weft", r["side"])):
        if "error" in r:
            rows.append([r["row"], r["side"], r["error"][:60], *[""] * 5, r["commit"]])
            continue
        cells = [f"{r['tokens_per_s']:,.0f}", f"{r['targets_per_s']:,.0f}", f"{r['share_of_limit']:.0%}" if "share_of_limit" in r else "-",
                 f"{r['peak_gb']:.1f}"]  # fmt: skip
        rows.append([r["row"], r["side"], *cells, f"{r['first_step_s']:.1f}", f"{r['loss']:.3f}", r["commit"]])
    head = ["work", "", "tokens/s", "that bear loss", "of a sustained product", "peak GB", "first step, s", "loss after 20 steps", "commit"]
    said = f"Random weights, LoRA of rank {result['rank']}, {result['batch']} tokens a step. {result.get('note', '')}"
    return f"{said}\n\n{table(head, rows)}"


def pictured(result: dict[str, Any]) -> str:
    return f"![{plots.alt(result)}]({PICTURE.relative_to(ROOT)})\n\n{train(result)}"


def methods(result: dict[str, Any]) -> str:
    def cells(row: dict[str, Any], what: str) -> list[str]:
        unit, factor = ("×", 1.0) if what in ("token", "forward", "step") else ("ms", 1e3)
        return ["-" if row[what].get(side) is None else figure(row[what][side] * factor, unit) for side in ("weft", "peft")]

    kinds = ("token", "forward", "step", "attach", "switch")
    rows = [[name, *(c for what in kinds for c in cells(row, what))] for name, row in result["rows"].items()]
    told = ("one token", "256 tokens", "training step", "attach", "there and back")
    head = ["", *(f"{what}, {side}" for what in told for side in ("weft", "peft"))]
    return f"Over the bare base: {result['base']}.\n\n{table(head, rows)}"


def combine(result: dict[str, Any]) -> str:
    head = ["", "`weft.combine`", "peft's arithmetic, by weft", "peft", "its name for it", "error of ΔW, weft", "error of ΔW, peft"]
    rows = [
        [r["how"], *(figure(r[side], "s") for side in ("weft_s", "face_s", "peft_s")), f"`{r['peft_name']}`",
         *("-" if r[side] is None else figure(r[side]) for side in ("weft_error", "peft_error"))]
        for r in result["rows"]
    ]  # fmt: skip
    return f"Base: {result['base']}; weights 0.5 and 0.5. The error is that against Σ wᵢΔWᵢ, relative.\n\n{table(head, rows)}"


def together(result: dict[str, Any]) -> str:
    ways = {"together": "at once", "one_after_another": "one after another"}
    rows = [[told, f"{result[way]['seconds']:.0f} s", f"{result[way]['tokens_per_s']:,.0f}", f"{result[way]['peak_bytes'] / 1e9:.1f}"]
            for way, told in ways.items()]  # fmt: skip
    faster, ranks = result["times_faster"], " and ".join(map(str, result["ranks"]))
    work = f"{result['adapters']} adapters of ranks {ranks} on one base of {result['shape']}, {result['steps']} steps of {result['tokens']}"
    said = f"{work} tokens each: × {faster['steps']:.2f} in steps, × {faster['all']:.2f} with compiling, which comes once a kind."
    return f"{said}\n\n{table(['', 'in all', 'tokens/s of the steps', 'peak GB'], rows)}"


def few_tokens(result: dict[str, Any]) -> str:
    rows = [
        [f"{r['shape'][0]} × {r['shape'][1]}, {r['format']}", str(r["tokens"]),
         *(f"{r[k]:.0f}" if k in r else "-" for k in ("fused_us", "bitsandbytes_us", "decoded_us", "bf16_us"))]
        for r in result["products"] if r["format"] in ("nf4+dq", "fp8") and r["tokens"] in (1, 4, 16)
    ]  # fmt: skip
    head = ["microseconds of one product", "tokens", "from its bytes", "bitsandbytes", "decoded first", "bf16"]
    return table(head, rows)


def load(result: dict[str, Any]) -> str:
    rows = [
        [who, f"{r['seconds']:.1f} s", *(f"{r[k] / 1e9:.2f}" for k in ("host_peak_bytes", "device_peak_bytes"))]
        for who, r in ((who, result[who]) for who in ("weft", "transformers")) if "seconds" in r
    ]  # fmt: skip
    said = f"{result['parameters'] / 1e9:.1f} billion parameters, {result['what']}; transformers with bitsandbytes."
    return f"{said}\n\n{table(['', 'seconds', 'host GB of its own', 'card GB'], rows)}"


# name of the block -> (file, how the file is made, what the block shows)
BLOCKS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "adapters": ("bench/results/adapters.json", "python bench/adapters.py", adapters),
    "combine": ("bench/results/combine.json", "python bench/combine.py", combine),
    "methods": ("bench/results/methods.json", "python bench/methods.py", methods),
    "step": ("bench/results/step.json", "python bench/step.py", step),
    "step_gpu": ("bench/results/step_gpu.json", "python bench/step.py --device cuda", step),
    "train": ("bench/results/train.json", "python bench/train.py", pictured),
    "together": ("bench/results/together_1B_gpu.json", "python bench/together.py --device cuda --shape 1B", together),
    "together_few": (
        "bench/results/together_1B_256_gpu.json", "python bench/together.py --device cuda --shape 1B --tokens 256", together
    ),
    "few_tokens": ("bench/results/few_tokens.json", "python bench/few_tokens.py", few_tokens),
    "load": ("bench/results/load_quantised_gpu.json", "python bench/load_quantised.py --device cuda --name load_quantised_gpu", load),
    "demo": ("src/weft/cli/demo_sweep.json", "python bench/demo_sweep.py", demo),
    "base": ("bench/results/base.json", "python bench/base/report.py", base),
}


def block(name: str) -> str:
    """What stands between the marks of one block."""
    file, command, show = BLOCKS[name]
    path = ROOT / file
    if not path.exists():
        return f"Not measured yet: `{command}` makes `{file}`.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    return f"{show(result)}\n\n{origin(result, path, command)}\n"


def render(text: str) -> str:
    """A README with all its blocks made anew. Raises KeyError for a block that nobody makes."""
    return BLOCK.sub(lambda m: m[1] + block(m[2]) + m[3], text)


def stale() -> bool:
    """Whether the picture is of other figures than the result's, or drawn by another program."""
    return not PICTURE.exists() or plots.mark(json.loads(PICTURED.read_text(encoding="utf-8"))) not in PICTURE.read_text(encoding="utf-8")


def main() -> int:
    now = README.read_text(encoding="utf-8")
    new, redraw = render(now), stale()
    if "--check" in sys.argv:
        old = [name for name, changed in (("README.md", new != now), (str(PICTURE.relative_to(ROOT)), redraw)) if changed]
        print(f"not up to date: {', '.join(old)}; python bench/readme.py" if old else "README.md and its picture are up to date")
        return int(bool(old))
    if redraw:
        svg = plots.draw(json.loads(PICTURED.read_text(encoding="utf-8")))
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(svg, encoding="utf-8")
    README.write_text(new, encoding="utf-8")
    print(f"README.md: {len(BLOCK.findall(now))} tables, {'changed' if new != now else 'as they were'}")
    print(f"{PICTURE.relative_to(ROOT)}: {'drawn anew' if redraw else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
