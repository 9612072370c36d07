"""The demo's page: loss curves, rank against score, the sweep behind the learning rates, and answers to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from weft.adapters.files import write_atomically

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>weft demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }}
h1, h2 {{ font-weight: 600; }} table {{ border-collapse: collapse; width: 100%; font-size: .92rem; }}
td, th {{ text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #e3e7ee; vertical-align: top; }}
.swept {{ color: #68737f; }} .right {{ color: #14713d; }} .wrong {{ color: #b3261e; }} code {{ font-size: .9em; }}
</style><script>{plotly}</script></head><body>
<h1>weft demo</h1>
<p>A base of a few million parameters, frozen, and what adapters of different size taught it. Task of the comparison: <b>{task}</b>.
The bare base answers {base:.1%} of the held-out questions.</p>
<h2>The table</h2>{table}
<p class="swept">Grey rows were not trained in this run; they come from the sweep of learning rates. Every method is shown at the learning
rate where its held-out loss was lowest.</p>
<h2>Learning</h2>{curves}
<h2>How much rank was needed</h2>{ranks}
<h2>Why these learning rates</h2>
<p>A comparison of methods at one shared learning rate compares learning rates. Each curve must turn up again on both sides of its best
point, or the grid was too small.</p>{rates}
<h2>Answers</h2>{answers}
<p>Merging the adapter changed no logit by more than {merge:.1e}.</p>
</body></html>
"""
COLOURS = ("#2f6fde", "#d9480f", "#2b8a3e", "#862e9c", "#c92a2a", "#0b7285", "#5f3dc4", "#5c940d")


def write_report(
    path: Path, task: str, base: float, rows: Sequence[Mapping[str, Any]], swept: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]], samples: Sequence[tuple[str, str, str, str]], runs: Sequence[Mapping[str, Any]],
    merge: float,
) -> Path:  # fmt: skip
    """Write the page, whole or not at all, with everything in it: it needs no network."""
    page = PAGE.format(
        plotly=get_plotlyjs(), task=escape(task), base=base, table=_table(task, rows, swept), curves=_curves(curves),
        ranks=_ranks(task, rows, swept), rates=_rates(task, runs), answers=_answers(samples), merge=merge,
    )  # fmt: skip
    write_atomically({path: page.encode()})
    return path


def _div(figure: go.Figure) -> str:
    figure.update_layout(
        template="plotly_white", height=420, margin={"l": 60, "r": 20, "t": 20, "b": 50}, legend={"orientation": "h", "y": -0.2}
    )
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def _table(task: str, rows: Sequence[Mapping[str, Any]], swept: Sequence[Mapping[str, Any]]) -> str:
    live = {r["method"]: r for r in rows if r["task"] == task}
    lines = ["<table><tr><th></th><th>trained parameters</th><th>learning rate</th><th>seconds</th><th>train loss</th>"
             "<th>held-out loss</th><th>exact match</th><th>adapter</th></tr>"]  # fmt: skip
    for s in swept:
        r = live.get(s["method"], s)
        seconds = f"{r['seconds']:.0f}" if r is not s else ""
        lines.append(
            f"<tr{'' if r is not s else ' class=swept'}><td>{escape(s['method'])}</td><td>{r['parameters']:,}</td><td>{r['lr']:.3g}</td>"
            f"<td>{seconds}</td><td>{r['train_loss']:.4f}</td><td>{r['eval_loss']:.4f}</td><td>{r['exact_match']:.1%}</td>"
            f"<td>{r['adapter_bytes'] / 1e3:,.0f} kB</td></tr>"
        )
    return "".join(lines) + "</table>"


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    figure = go.Figure()
    for i, (name, history) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        train = [(h["step"], h["loss"]) for h in history if "loss" in h]
        held = [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
        figure.add_scatter(x=[s for s, _ in train], y=[v for _, v in train], name=name, line={"color": colour, "width": 1.2}, opacity=0.55)
        figure.add_scatter(x=[s for s, _ in held], y=[v for _, v in held], name=f"{name}, held out", mode="lines+markers",
                           line={"color": colour, "dash": "dot"}, showlegend=False)  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss (nats a token); dots: held out", type="log")
    return _div(figure)


def _ranks(task: str, rows: Sequence[Mapping[str, Any]], swept: Sequence[Mapping[str, Any]]) -> str:
    figure = go.Figure()
    figure.add_scatter(x=[s["parameters"] for s in swept], y=[s["exact_match"] for s in swept], text=[s["method"] for s in swept],
                       error_y={"array": [s["spread"] for s in swept]}, mode="markers+text", textposition="top center",
                       name="sweep, mean ± sd", marker={"color": "#9aa5b1", "size": 9})  # fmt: skip
    here = [r for r in rows if r["task"] == task]
    figure.add_scatter(x=[r["parameters"] for r in here], y=[r["exact_match"] for r in here], text=[r["method"] for r in here],
                       mode="markers", name="trained in this run", marker={"color": COLOURS[0], "size": 11})  # fmt: skip
    figure.update_xaxes(title="trained parameters", type="log")
    figure.update_yaxes(title="exact match on held-out questions", tickformat=".0%")
    return _div(figure)


def _rates(task: str, runs: Sequence[Mapping[str, Any]]) -> str:
    figure = go.Figure()
    for i, method in enumerate(dict.fromkeys(r["method"] for r in runs if r["task"] == task)):
        mine = [r for r in runs if r["task"] == task and r["method"] == method]
        rates = sorted({r["lr"] for r in mine})
        losses = [[r["eval_loss"] for r in mine if r["lr"] == lr] for lr in rates]
        figure.add_scatter(x=rates, y=[sum(v) / len(v) for v in losses], name=method, mode="lines+markers", line={"color": COLOURS[i % 8]})
    figure.update_xaxes(title="learning rate", type="log")
    figure.update_yaxes(title="held-out loss (nats a token)", type="log")
    return _div(figure)


def _answers(samples: Sequence[tuple[str, str, str, str]]) -> str:
    lines = ["<table><tr><th>who</th><th>question</th><th>answer</th><th>wanted</th></tr>"]
    for who, question, reference, answer in samples:
        mark = "right" if answer.strip() == reference.strip() else "wrong"
        lines.append(
            f"<tr><td>{escape(who)}</td><td>{escape(question)}</td><td class={mark}>{escape(answer[:200])}</td>"
            f"<td>{escape(reference)}</td></tr>"
        )
    return "".join(lines) + "</table>"
