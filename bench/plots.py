"""The README's picture of training, drawn from the committed result; `python bench/readme.py` writes it beside its tables.

It carries the mark of what it was made from (the result's figures and this file), so whether it is up to date does not hang on the version
of matplotlib. It stands on a card of its own, and the reader's browser takes the light colours or the dark ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

INK, MUTED, LINE, CARD, WORSE = "#1f2328", "#59636e", "#d1d9e0", "#ffffff", "#bc4c00"
SIDES = {"weft": "#0f7b6c", "unsloth": "#5f6973", "peft+liger": "#98a1aa", "peft": "#c4cad0"}  # in the order of their bars
DARK = {INK: "#f0f6fc", MUTED: "#9198a1", LINE: "#3d444d", CARD: "#0d1117", WORSE: "#f0883e",
        "#0f7b6c": "#2dd4bf", "#5f6973": "#a9b1bb", "#98a1aa": "#757d87", "#c4cad0": "#4c545e"}  # fmt: skip
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
WIDTH, LEFT, RIGHT = 840, 24, 816  # pixels, as everything here
# figure, its head, whether more is better, how it is written; where the bars begin and end, and where the value and the ratio end
PANELS = (("tokens_per_s", "Tokens a second", True, "{:,.0f}", 238, 432, 492, 538),
          ("peak_gb", "Peak memory, GB", False, "{:.1f}", 576, 724, 766, RIGHT))  # fmt: skip

Row = dict[str, Any]


def grouped(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Row]]]:
    """Size of the model -> work -> side -> row: large models first, and of one size the fastest work first."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in result["rows"]:
        size, work = re.match(r"(\S+(?: MoE)?) ?(.*)", row["row"]).groups()
        found.setdefault(size, {}).setdefault(work, {})[row["side"]] = row

    def speed(sides: dict[str, Row]) -> float:
        return max(row.get("tokens_per_s", 0) for row in ([sides["weft"]] if "weft" in sides else sides.values()))

    sizes = sorted(found, key=lambda size: -float(re.match(r"[\d.]*", size)[0] or 0))
    return {size: dict(sorted(found[size].items(), key=lambda item: -speed(item[1]))) for size in sizes}


def ratio(sides: dict[str, Row], key: str, more: bool) -> float | None:
    """weft's figure over that of the peer whose figure is best; None where either is missing."""
    peers = [row[key] for side, row in sides.items() if side != "weft" and key in row]
    return sides["weft"][key] / (max if more else min)(peers) if peers and key in sides.get("weft", {}) else None


def reason(error: str) -> str:
    known = {"OutOfMemory": "out of memory", "out of memory": "out of memory", "not installed": "not installed", "not run": "not run"}
    return next((told for sign, told in known.items() if sign in error), "failed")


def mark(result: dict[str, Any]) -> str:
    """What a picture of this result has in it when it is up to date."""
    shown = [[row["row"], row["side"], row.get("tokens_per_s"), row.get("peak_gb"), row.get("error")] for row in result["rows"]]
    source = json.dumps([shown, head(result)]) + Path(__file__).read_text(encoding="utf-8")
    return f"<!-- made from {hashlib.sha256(source.encode()).hexdigest()[:16]} -->"


def head(result: dict[str, Any]) -> tuple[str, str]:
    on = result["machine"].get("gpu") or result["machine"]["cpu"]
    return f"Training on one {on}", f"LoRA of rank {result['rank']}, {result['batch'].replace('x', '×')} tokens a step, random weights"


def alt(result: dict[str, Any]) -> str:
    """The picture in words: how weft stands to the best peers, and the figures of the first row that has one."""
    groups = [(f"{size} {work}", sides) for size, works in grouped(result).items() for work, sides in works.items()]
    groups = [(name, sides) for name, sides in groups if ratio(sides, "tokens_per_s", True)]
    if not groups:
        return f"{head(result)[0]}: speed and peak memory of weft."
    speed, memory = ([ratio(sides, key, more) for _, sides in groups] for key, _, more, *_ in PANELS)
    name, sides = groups[0]
    ranked = sorted((row for row in sides.values() if "tokens_per_s" in row), key=lambda row: (row["side"] != "weft", -row["tokens_per_s"]))
    first = ", ".join(f"{row['side']} {row['tokens_per_s']:,.0f} tokens a second at {row['peak_gb']:.1f} GB" for row in ranked)
    return (f"{head(result)[0]}: weft has × {min(speed):.2f} to × {max(speed):.2f} of the best peer's speed and × {min(memory):.2f} to "
            f"× {max(memory):.2f} of its memory. {name}: {first}.")  # fmt: skip


def draw(result: dict[str, Any]) -> str:
    """The picture, an SVG: a group for each row, a bar for each side. Bars of speed share a scale within a size of model, those of memory
    everywhere."""
    import matplotlib  # in the dev extra; asking whether a picture is up to date does without
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    groups = grouped(result)
    order = list(SIDES).index  # a side that is not there is an error, never left out
    memory = max((row.get("peak_gb", 0) for row in result["rows"]), default=0)
    things: list[Any] = []  # bars and texts, from the top down: the height is known at the end

    def text(x: float, y: float, said: str, size: float = 12, colour: str = INK, **how: Any) -> None:
        things.append(lambda ax: ax.text(x, y, said, size=size, color=colour, va="baseline", **how))

    def bar(x: float, y: float, width: float, height: float, colour: str) -> None:
        things.append(lambda ax: ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0, clip_on=False)))

    title, what = head(result)
    text(LEFT, 36, title, 16, weight="bold")
    text(LEFT, 56, what, 12, MUTED)
    x = RIGHT
    for side in sorted({row["side"] for row in result["rows"]}, key=order, reverse=True):
        x -= 12 + 5.5 * len(side)
        text(x + 6, 36, side, 12, SIDES["weft"] if side == "weft" else INK, weight="bold" if side == "weft" else "normal")
        bar(x - 8, 27, 9, 9, SIDES[side])
        x -= 16
    y = 88.0
    for _, name, more, _, begin, _, _, end in PANELS:
        text(begin, y, name, 12, weight="bold")
        text(end, y, "more is better" if more else "less is better", 11, MUTED, ha="right")
    y += 10
    for size, works in groups.items():
        bar(LEFT, y, RIGHT - LEFT, 1, LINE)
        y += 16
        fastest = max((row.get("tokens_per_s", 0) for sides in works.values() for row in sides.values()), default=0)
        text(LEFT, y + 10, size, 12.5, weight="bold")
        for work, sides in works.items():
            text(LEFT + 60, y + 10, work)
            top = y
            for side in sorted(sides, key=order):
                row, height = sides[side], 11 if side == "weft" or "error" in sides[side] else 6
                if "error" in row:
                    text(PANELS[0][4], y + 9, f"{side}: {reason(row['error'])}", 10, MUTED, style="italic")
                for (key, _, more, form, begin, end, value, last), most in zip(PANELS, (fastest, memory), strict=True):
                    if key not in row:
                        continue
                    bar(begin, y, max(1, (end - begin) * row[key] / most), height, SIDES[side])
                    if side == "weft":
                        text(value, y + 10, form.format(row[key]), weight="bold", ha="right")
                        if over := ratio(sides, key, more):
                            colour = INK if f"{over:.2f}" == "1.00" else SIDES["weft"] if (over > 1) == more else WORSE
                            text(last, y + 10, f"×{over:.2f}", 12, colour, weight="bold", ha="right")
                y += height + 2
            y = max(y, top + 13) + 14
    bar(LEFT, y, RIGHT - LEFT, 1, LINE)
    note = "×: weft over the best peer of the row, in speed and in memory each. Bars of speed compare within one size of model."
    text(LEFT, y + 22, note, 11, MUTED)
    height = y + 38

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "weft", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        ax.axis("off")
        figure.patch.set(facecolor=CARD, edgecolor=LINE, linewidth=2)
        for thing in things:
            thing(ax)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'width="{WIDTH}" height="{height:.0f}"', out.getvalue(), count=1)
    dark = "".join(f'[style*="{what}: {light}"]{{{what}:{dark}!important}}' for light, dark in DARK.items() for what in ("fill", "stroke"))
    style = f"<style>@media (prefers-color-scheme: dark){{{dark}}}</style>"
    return re.sub(r"<svg[^>]*>", lambda m: f"{m[0]}\n {mark(result)}\n {style}", svg.replace("'DejaVu Sans'", FONT), count=1)
