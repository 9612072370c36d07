"""Where the seconds to the first training step go: `weft.step.prepare` (plain pass, compile, fast pass) and the first steps.

    python bench/first_step.py [--rows card 8B:2 8B:32 8B:2:nf4] [--tokens 2048]       # one CUDA device
    python bench/first_step.py --device cpu --rows 1B:2 --tokens 16                    # what Python takes is the same code there

A row is shape:layers[:base[:memory[:method]]], shapes as in bench/train.py; "card" times a card's own beginnings. Each is run in a process
of its own, cold (the compiler's and Triton's caches in a new folder) and then warm (another process, the same folder). Spans are those that
torch's compiler times itself, and some of weft's and Triton's; `self` is a span without the spans inside it, so that those of one thread
add up to the whole. `--functions` says which functions the time is in instead (cProfile, everything slower by half).
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
BEGAN = time.perf_counter()
ROWS = ["card", "8B:32", "8B:2", "8B:2:nf4", "8B:2:fp8"]


class Spans:
    """Named spans, each with its whole time and that of its own: (name, thread) -> [count, whole, self] in seconds."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        self.here = threading.local()

    def begin(self, name: str) -> None:
        self._open().append([name, time.perf_counter(), 0.0])

    def end(self, name: str) -> None:
        open_ = self._open()
        while open_:
            top, started, inside = open_.pop()
            took = time.perf_counter() - started
            entry = self.found[top, threading.current_thread().name]
            entry[0] += 1
            entry[1] += took
            entry[2] += took - inside
            if open_:
                open_[-1][2] += took
            if top == name:
                return

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def around(self, owner: Any, attribute: str, name: str | None = None) -> None:
        """Time every call of a function."""
        work = getattr(owner, attribute)

        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(name or attribute):
                return work(*args, **kwargs)

        setattr(owner, attribute, timed)

    def _open(self) -> list[list[Any]]:
        if not hasattr(self.here, "open"):
            self.here.open = []
        return self.here.open  # type: ignore[no-any-return]


def listen(spans: Spans, cuda: bool) -> None:
    """Let the compiler's own timers, weft's parts of `prepare`, and Triton tell their spans."""
    import torch
    from torch._dynamo.utils import ChromiumEventLogger

    import weft.step.fast as fast
    import weft.step.inside as inside
    import weft.step.regions as regions
    import weft.step.trial as trial

    start, end = ChromiumEventLogger.log_event_start, ChromiumEventLogger.log_event_end

    def began(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        spans.begin(name)
        return start(self, name, *args, **kwargs)

    def ended(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        spans.end(name)
        return end(self, name, *args, **kwargs)

    ChromiumEventLogger.log_event_start, ChromiumEventLogger.log_event_end = began, ended  # type: ignore[method-assign]
    for module, names in (
        (fast, ("fusible", "unmaskable", "install", "uninstall", "narrowable", "fitting")),
        (trial, ("plain_pass", "fast_pass", "differences", "install", "uninstall", "release")),
    ):
        for name in names:
            spans.around(module, name, f"weft: {name}")
    spans.around(inside.gated, "gated_mlps", "weft: gated_mlps")
    spans.around(inside, "stacks", "weft: stacks")
    spans.around(trial.early, "launch", "weft: early.launch")
    spans.around(inside.stacked, "install", "weft: stacked.install")
    spans.around(inside.stacked, "working", "weft: stacked.working")
    stirred = trial.stirred

    @contextmanager
    def stirring(*args: Any) -> Iterator[None]:
        with ExitStack() as stack:
            with spans.span("weft: stirred"):
                stack.enter_context(stirred(*args))
            yield

    trial.stirred = stirring
    spans.around(fast.Fast, "loss", "weft: loss")
    spans.around(torch.Tensor, "backward", "backward pass")
    spans.around(threading.Thread, "join", "a thread's end")
    spans.around(regions, "import_module", "weft: import_module")
    if not cuda:
        fast.usable = lambda tensor: True  # type: ignore[attr-defined]  # fuse gated MLPs as on a card; their plain twins do the work
        return
    import triton.backends.nvidia.driver as driver
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    spans.around(driver, "compile_module_from_src", "triton: a launcher in C")
    spans.around(CompiledKernel, "_init_handles", "triton: loading")
    compiles = JITFunction._do_compile

    def do_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        with spans.span(f"triton: {self.fn.__name__}"):
            return compiles(self, *args, **kwargs)

    JITFunction._do_compile = do_compile


def card() -> dict[str, Any]:
    """Milliseconds of a card's beginnings: each is named, and the second time is the same once more."""
    import torch
    from torch.nn import functional as F

    marks: dict[str, list[float]] = {}

    def time_of(name: str, work: Any) -> None:
        for _ in range(2):
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
            marks.setdefault(name, []).append(round((time.perf_counter() - started) * 1e3, 1))

    def attention(rows: int) -> None:
        q, k, v = (torch.randn(rows, n, 2048, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (32, 8, 8))
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()

    x = None

    def context() -> None:
        nonlocal x
        x = torch.zeros(4096, 4096, device="cuda", dtype=torch.bfloat16)

    time_of("context", context)
    time_of("matrix product", lambda: x @ x)
    time_of("a thinner one", lambda: x @ x[:, :16])
    for rows in (1, 4):
        time_of(f"attention, {rows} x 2048", lambda rows=rows: attention(rows))
    time_of("randn, softmax, silu, pow, rsqrt", lambda: F.silu(torch.randn_like(x).softmax(-1)).pow(2).rsqrt().sum())
    return {"row": "card", "ms, first and second": marks}


def alone(row: str, device: str, tokens: int, functions: bool, without: list[str]) -> dict[str, Any]:
    """One row in this process: seconds by part."""
    marks = {"interpreter": 0.0}
    last = BEGAN

    def mark(name: str) -> None:
        nonlocal last
        if device == "cuda" and "torch" in marks:
            torch.cuda.synchronize()
        marks[name], last = time.perf_counter() - last, time.perf_counter()

    import torch

    mark("torch")
    import transformers  # noqa: F401

    mark("transformers")
    from _common import set_inductor

    import train
    import weft
    from weft.step import prepare, warm
    from weft.train.flat import Flat

    mark("weft")
    cuda = device == "cuda"
    shape, layers, base, memory, method = (*row.split(":"), *("", "bf16", "1", "LoRA")[len(row.split(":")) - 1 :])
    shapes = train.SHAPES
    shapes["this"] = shapes[shape] | {"num_hidden_layers": int(layers)} | ({} if cuda else {"vocab_size": 1024})
    if not cuda:
        train.BATCH = 1
    train.LENGTH = tokens
    set_inductor()
    drop(without)
    warm(torch.device(device))
    ready = pool(time.perf_counter())
    model = train.base("this", device)
    if base != "bf16":
        from weft.quant import quantise_

        quantise_(model, base)
    name, settings, _, _ = train.METHODS[method]
    made = getattr(weft, name)(**settings)
    torch.manual_seed(0)
    weft.adapt(model, made)
    model.train()
    parameters = weft.adapters.trainable(model, "default")
    flat = Flat(parameters, made.lr_scale)
    optimiser = torch.optim.AdamW([p for _, p in flat.groups], lr=1e-4, weight_decay=0.0, fused=True)
    given = [replace(b, attention_mask=None).to(device) for b in train.batches("full", shapes["this"]["vocab_size"], 3)]
    mark("model and adapter")
    spans = Spans()
    listen(spans, cuda)
    profile = cProfile.Profile() if functions else None
    if profile:
        profile.enable()
    with spans.span("prepare"):
        fast = prepare(model, given[0], parameters, memory=float(memory), varying=False, compile=True, fp8=base == "fp8", say=print)
    mark("prepare")
    losses = []
    for i in range(3):
        with spans.span(f"step {i + 1}"):
            loss = fast.loss(given[i]) / given[i].n_targets
            loss.backward()
            flat.clip(1.0)
            optimiser.step()
            flat.zero_grad()
            losses.append(float(loss.detach()))
        mark(f"step {i + 1}")
    if profile:
        profile.disable()
        print_functions(profile)
    from torch._dynamo.utils import counters, get_compilation_metrics

    kernels = [m.triton_kernel_compile_times_us for m in get_compilation_metrics() if m.triton_kernel_compile_times_us]
    rows = [[n, thread, int(c), round(whole, 3), round(own, 3)] for (n, thread), (c, whole, own) in spans.found.items()]
    return {
        "row": row, "first_step_s": marks["prepare"] + marks["step 1"], "marks": {k: round(v, 3) for k, v in marks.items()},
        "losses": losses, "path": fast.describe(), "said": fast.said, "spans": sorted(rows, key=lambda r: -r[4]),
        "counters": cached(counters), "kernels_us": kernels, "workers_ready_s": ready[:1],
    }  # fmt: skip


def drop(without: list[str]) -> None:
    """Leave out what prepares in threads."""
    from weft.step import trial, warming

    if "card" in without:
        nothing = threading.Thread(target=time.time)
        nothing.start()
        warming._card.append(nothing)
    if "ahead" in without:
        trial.compile_ahead = lambda *args: None


def pool(began: float) -> list[float]:
    """Where the seconds stand until the compiler's workers answer, once they do."""
    ready: list[float] = []

    def wait() -> None:
        warm().join()
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.wait_pool_ready()
        ready.append(round(time.perf_counter() - began, 2))

    from weft.step import warm

    threading.Thread(target=wait, name="waits-for-workers", daemon=True).start()
    return ready


def cached(counters: Any) -> dict[str, dict[str, int]]:
    """What the compiler's caches had, and why not."""
    told = {"aot_autograd": dict(counters["aot_autograd"]), "inductor": {k: v for k, v in counters["inductor"].items() if "cache" in k}}
    return told | {"frames": dict(counters["frames"]), "stats": dict(counters["stats"])}


def print_functions(profile: cProfile.Profile) -> None:
    for key in ("tottime", "cumtime"):
        stats = pstats.Stats(profile)
        stats.sort_stats(key).print_stats(60)


def run(row: str, how: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--alone", row, "--device", args.device, "--tokens", str(args.tokens)]
    command += ["--functions"] * args.functions + ["--without", *args.without]
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | caches)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if args.functions:
        print(done.stdout)
    result: dict[str, Any] = json.loads(found[-1][7:]) if found else {"row": row, "error": done.stderr[-2000:]}
    return {"how": how, "process_s": round(time.perf_counter() - started, 2)} | result


def table(result: dict[str, Any], least: float = 0.03) -> str:
    """A row's result in words."""
    if "error" in result:
        return f"{result['row']}, {result['how']}: {result['error']}"
    if result["row"] == "card":
        return json.dumps(result)
    lines = [f"\n{result['row']}, {result['how']}: first step after {result['first_step_s']:.2f} s   {result['path']}"]
    lines += [str(result["marks"]), json.dumps(result["counters"])]
    lines.append(f"kernels' compile times in the workers (ready after {result['workers_ready_s']} s), us: {result['kernels_us']}")
    lines.append(f"{'self':>8} {'whole':>8} {'calls':>6}")
    lines += [
        f"{own:8.2f} {whole:8.2f} {count:6d}  {name}" + ("" if thread == "MainThread" else f"  [{thread}]")
        for name, thread, count, whole, own in result["spans"] if own >= least
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--tokens", type=int, default=2048, help="of a row of the batch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--without", nargs="*", default=[], choices=["card", "ahead"], help="threads that are left out, for a comparison")
    parser.add_argument("--functions", action="store_true")
    parser.add_argument("--alone", metavar="ROW")
    args = parser.parse_args()
    if args.alone:
        found = card() if args.alone == "card" else alone(args.alone, args.device, args.tokens, args.functions, args.without)
        print("RESULT " + json.dumps(found))
        return
    from _common import save

    results = []
    for row in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            for how in ("cold", "warm")[: 1 if row == "card" else 2]:
                results.append(run(row, how, folder, args))
                print(table(results[-1]), flush=True)
                save("first_step", {"tokens": args.tokens, "device": args.device, "rows": results}, ("torch", "transformers", "triton"))


if __name__ == "__main__":
    main()
