"""What `weft demo` does and shows, act by act."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

import weft
from weft.cli.common import out, step
from weft.cli.demo import progress_bar
from weft.cli.demo_report import write_report
from weft.cli.demo_runs import HELD_OUT, METHODS, STEPS, TOKENS, Row, best, committed_sweep, recipe, sweep, work
from weft.data import demo as tasks
from weft.data import load_rows
from weft.train import Result, answers, exact_match, fit
from weft.train.evaluate import end_of_turn, left_padded, prompt_ids
from weft.train.progress import clock

PROSE = ("The function returns", "If the optional argument", "This module provides")


class Demo:
    """One run of the demo: the base, what was trained on it so far, and where things are written."""

    def __init__(self, folder: Path, task: str, device: str) -> None:
        self.folder, self.task, self.device = folder, task, device
        self.data = folder / "data"
        self.console = out()
        self.model = weft.load_base("embedded", base="fp32", device=device)
        self.tokenizer = weft.load_tokenizer("embedded")
        for name in tasks.TASKS:
            tasks.write(name, self.data)
        self.chosen = committed_sweep()
        self.rows: list[Row] = []
        self.curves: dict[str, list[dict[str, Any]]] = {}
        self.samples: list[tuple[str, str, str, str]] = []  # adapter, question, reference, answer

    # ---- the base ---------------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """The base: what it writes, and that it follows none of the tasks."""
        parameters = sum(p.numel() for p in self.model.parameters())
        self._title(f"The base: {parameters / 1e6:.1f} million parameters, trained on CPython's own documentation and source")
        for start in PROSE:
            self.console.print(f"  [dim]{start}[/] {escape(self._continue(start))}")
        with step("asking the base", tell=False):
            held = self._held(self.task)
            before = exact_match(self.model, self.tokenizer, held, tasks.TASKS[self.task].max_new_tokens, 100)
        self.base_match = before.share
        question, reference, answer = before.answers[0]
        self.console.print(
            f"\nThe task: {tasks.TASKS[self.task].title}. {HELD_OUT} held-out questions; the base answers {before.share:.1%} of them."
        )
        self.console.print(
            f"  question   {escape(question)}\n  wanted     {escape(reference)}\n  the base   [red]{escape(answer[:100]) or '(nothing)'}[/]"
        )
        self.samples.append(("base", question, reference, answer))

    # ---- the comparison ---------------------------------------------------------------------------------------------

    def sweep(self) -> dict[str, Any]:
        """Every method at every learning rate, here and now; one seed."""
        jobs = work([self.task], METHODS, [0]) + work([t for t in tasks.TASKS if t != self.task], ["LoRA r=8"], [0])
        self._title(f"The sweep: {len(jobs)} runs")
        count = iter(range(1, len(jobs) + 1))

        def tell(row: Row) -> None:
            self.console.print(f"  {next(count)}/{len(jobs)}  {row.task:8} {row.method:17} lr {row.lr:<8.3g} held-out {row.eval_loss:.4f}"
                               f"  exact match {row.exact_match:.1%}")  # fmt: skip

        self.chosen = {"runs": sweep(self.model, self.tokenizer, jobs, self.data, self.folder / "runs", tell), "live": True}
        return self.chosen

    def compare(self, live: tuple[str, ...], swept: dict[str, Any] | None) -> None:
        """LoRA at several ranks and full fine-tuning, each at its best learning rate."""
        self._title(
            f"Training: {STEPS} steps of {TOKENS:,} tokens each, the base frozen, every method at the learning rate its sweep found"
        )
        live = live if swept is None else tuple(METHODS)
        for method in live:
            keep = method == "LoRA r=8"
            where = self.folder / "adapters" / self.task if keep else self.folder / "runs" / method.replace(" ", "-")
            self._train(self.task, method, where)
            weft.remove(self.model)  # the next method starts from the base, not from this adapter
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in ("trained", "lr", "time", "train", "held-out", "exact", "adapter"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_row("the bare base", "0", "", "", "", "", f"{self.base_match:.1%}", "")
        for method in METHODS:
            row = next((r for r in self.rows if r.method == method and r.task == self.task), None)
            if row is not None:
                losses = f"{row.train_loss:.4f}", f"{row.eval_loss:.4f}"
                match, size = f"[bold]{row.exact_match:.1%}[/]", _size(row.adapter_bytes)
                table.add_row(method, f"{row.parameters:,}", f"{row.lr:.3g}", clock(row.seconds), *losses, match, size)
            elif (b := self._best(self.task, method)) is not None:
                losses = f"{b['train_loss']:.4f}", f"{b['eval_loss']:.4f}"
                table.add_row(f"{method} *", f"{b['parameters']:,}", f"{b['lr']:.3g}", "", *losses, f"{b['exact_match']:.1%}",
                              _size(b["adapter_bytes"]), style="dim")  # fmt: skip
        self.console.print(table)
        self.console.print("[dim]trained: parameters; train and held-out: loss in nats a token; exact: answers equal to the reference[/]")
        if swept is None:
            seeds = len(self.chosen["setup"]["seeds"])
            self.console.print(
                f"[dim]* not trained here: {'one seed' if seeds == 1 else f'the mean of {seeds} seeds'} in the committed sweep "
                f"({self.chosen['date']}, {self.chosen['machine']['gpu'] or self.chosen['machine']['cpu']}).\n"
                f"  `weft demo --all` trains every row, after making the sweep here.[/]"
            )
        if edges := [m for m in METHODS if (b := self._best(self.task, m)) is not None and not b["interior"]]:
            self.console.print(
                f"[yellow]The best learning rate of {', '.join(edges)} lies at the edge of its grid: read those rows with care.[/]"
            )

    def others(self) -> None:
        """Adapters for the other two tasks on the same base."""
        rest = [t for t in tasks.TASKS if t != self.task]
        self._title(f"The same frozen base learns {' and '.join(rest)}")
        for task in rest:
            result = self._train(task, "LoRA r=8", self.folder / "adapters" / task)
            weft.remove(self.model)
            if self.console.is_terminal:  # elsewhere the run has said so itself
                self.console.print(f"  {task:8} {result.exact_match:.1%} exact in {clock(result.seconds)}, {_size(result.adapter_bytes)}")

    def _train(self, task: str, method: str, folder: Path) -> Result:
        found = self._best(task, method)
        assert found is not None, f"the sweep has no {method} for {task}"
        with progress_bar() as bar:
            shown = bar.add_task(f"{task}, {method}", total=STEPS, loss="")

            def follow(event: dict[str, Any]) -> None:
                if event["event"] in ("at", "step"):
                    bar.update(shown, completed=event["step"], loss=f"loss {event['loss']:.3f}")
                elif event["event"] == "eval":
                    bar.update(shown, completed=event["step"], loss="evaluating")

            asked = recipe(task, method, found["lr"], self.data, folder)
            result = fit(self.model, asked, tokenizer=self.tokenizer, overwrite=True, on_event=follow)
        row = Row.of(result, task, method, found["lr"], 0)
        self.rows.append(row)
        self.curves[f"{task}, {method}"] = result.history
        if not self.console.is_terminal:
            self.console.print(
                f"  {task}, {method}: {result.exact_match:.1%} exact, held-out loss {row.eval_loss:.4f}, {clock(result.seconds)}"
            )
        for question, reference, answer in result.answers[:3]:
            self.samples.append((f"{task}, {method}", question, reference, answer))
        return result

    # ---- living with adapters ---------------------------------------------------------------------------------------

    def swap(self) -> None:
        """Load the three saved adapters and switch between them in one process."""
        self._title("Three adapters on one base: saved, loaded again, swapped")
        for task in tasks.TASKS:
            weft.load(self.model, self.folder / "adapters" / task, name=task)
        for task in tasks.TASKS:
            row = self._held(task)[1]
            question = row.messages[0]["content"]
            self.console.print(f"  {escape(question)}")
            for name in (task, None):
                with weft.using(self.model, name):
                    (answer,) = answers(self.model, self.tokenizer, [row.messages[:1]], tasks.TASKS[task].max_new_tokens)
                right = tasks.exact_match(answer, row.messages[-1]["content"])
                self.console.print(f"    {name or 'bare base':10} [{'green' if right else 'red'}]{escape(answer[:110])}[/]")

    def mix(self) -> None:
        """One batch whose rows go through different adapters, one of them through none."""
        self._title("One batch, every row its own adapter")
        owners: list[str | None] = [*tasks.TASKS, None, *reversed(tasks.TASKS)]
        rows = [self._held(name or self.task)[2 + i % 3] for i, name in enumerate(owners)]
        stop, device = end_of_turn(self.tokenizer, self.model), next(self.model.parameters()).device
        ids, mask = left_padded([prompt_ids(self.tokenizer, row.messages[:1]) for row in rows], self.tokenizer.pad_token_id)
        with torch.no_grad(), weft.rows(self.model, owners):
            made = self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=64, do_sample=False,
                                       eos_token_id=stop, pad_token_id=self.tokenizer.pad_token_id)[:, ids.shape[1] :]  # fmt: skip
        table = Table("row", "adapter", "answer", "wanted", box=SIMPLE_HEAD)
        for i, (name, row, line) in enumerate(zip(owners, rows, made.tolist(), strict=True)):
            end = next((k for k, t in enumerate(line) if t in stop), len(line))
            answer, wanted = self.tokenizer.decode(line[:end], skip_special_tokens=True), row.messages[-1]["content"]
            colour = "green" if tasks.exact_match(answer, wanted) else "red"
            table.add_row(str(i), name or "none", f"[{colour}]{escape(answer[:70])}[/]", escape(wanted[:70]))
        self.console.print(table)

    def merge(self) -> None:
        """Fold one adapter into the weights, and take it out again."""
        self._title("Merged: the adapter becomes part of the weights")
        ids = torch.tensor([prompt_ids(self.tokenizer, self._held(self.task)[0].messages[:1])], device=next(self.model.parameters()).device)
        with torch.no_grad():
            with weft.using(self.model, None):
                bare = self.model(ids).logits
            weft.use(self.model, self.task)
            adapted = self.model(ids).logits
            weft.merge(self.model, self.task)
            merged = self.model(ids).logits
            weft.unmerge(self.model)
            weft.use(self.model, None)
            restored = self.model(ids).logits
        self.merge_difference = (merged - adapted).abs().max().item()
        self.console.print(f"  largest logit difference, merged against unmerged: {self.merge_difference:.2e}")
        self.console.print(f"  (the adapter itself moves the logits by up to {(adapted - bare).abs().max():.1f})")
        same = torch.equal(restored, bare)
        self.console.print(f"  unmerged and switched off, the base is {'bit for bit' if same else '[red]NOT[/]'} what it was")

    def report(self, seconds: float) -> None:
        """The curves and the table as a page."""
        sweep_rows = [dict(method=m, **b) for m in METHODS if (b := self._best(self.task, m)) is not None]
        path = write_report(
            self.folder / "demo-report.html", self.task, self.base_match, [asdict(r) for r in self.rows], sweep_rows, self.curves,
            self.samples, self.chosen["runs"], self.merge_difference,
        )  # fmt: skip
        self._title(f"Done in {clock(seconds)}")
        self.console.print(f"  the curves   {path}\n  the adapters {self.folder / 'adapters'} (peft and vLLM load them)")
        self.console.print(f"  try          weft generate --adapter {self.folder / 'adapters' / self.task}")

    # ---- small things -----------------------------------------------------------------------------------------------

    def _best(self, task: str, method: str) -> dict[str, Any] | None:
        """What the sweep says of a method on a task; a task that was swept for rank 8 only lends its rate to no other."""
        known = any(r["task"] == task and r["method"] == method for r in self.chosen["runs"])
        if known:
            return best(self.chosen, task, method)
        other = next((r["task"] for r in self.chosen["runs"] if r["method"] == method), None)
        if other is None:
            return None
        return best(self.chosen, other, method) | {"exact_match": math.nan, "train_loss": math.nan, "eval_loss": math.nan, "interior": True}

    def _held(self, task: str) -> list[Any]:
        rows = load_rows(str(self.data / f"{task}.held_out.jsonl"))
        return [replace(row) for row in rows[:HELD_OUT]]

    def _continue(self, start: str) -> str:
        ids = self.tokenizer(start, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            made = self.model.generate(
                **ids.to(next(self.model.parameters()).device), max_new_tokens=28, do_sample=False, repetition_penalty=1.2,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        return " ".join(self.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).split())

    def _title(self, text: str) -> None:
        self.console.print(f"\n[bold]{escape(text)}[/]")


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"
