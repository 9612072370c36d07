"""The part of gpu_check that holds layers as CUDA graphs against the same compiled layers one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import weft
from weft.data import Example, pack, pad
from weft.data.batches import filled
from weft.models import attention
from weft.quant import quantise_
from weft.step import peak_memory, prepare, reset_peak_memory
from weft.step.regions import repeated
from weft.train.flat import AdamW, Flat

CARD = torch.device("cuda")
SMALL = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             vocab_size=1000, tie_word_embeddings=True)  # fmt: skip
WIDE = SMALL | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8,
                    head_dim=64, vocab_size=32000)  # fmt: skip
# what is trained -> (shape, base, method, rows, micro-batches of a step)
TRIED: dict[str, tuple[dict[str, Any], str, Any, str, int]] = {
    "LoRA, two micro-batches a step": (SMALL, "bf16", weft.LoRA(rank=8), "full", 2),
    "DoRA": (SMALL, "bf16", weft.DoRA(rank=8), "full", 1),
    "AdaLoRA": (SMALL, "bf16", weft.AdaLoRA(rank=8, target_rank=4), "full", 1),
    "nf4, packed rows": (SMALL, "nf4", weft.LoRA(rank=8), "packed", 2),
    "bf16, packed rows and an adapter of the embedding": (SMALL, "bf16", weft.LoRA(rank=8, targets=["embed_tokens", "q_proj", "up_proj"]),
                                                          "packed", 1),
    "rows of two lengths": (SMALL, "bf16", weft.LoRA(rank=8), "two", 1),
    "12 layers of width 1024": (WIDE, "bf16", weft.LoRA(rank=16), "full", 1),
}  # fmt: skip
STEPS = 10


def model_of(shape: dict[str, Any], base: str, method: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with CARD:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, max_position_embeddings=4096))
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    if base != "bf16":
        quantise_(model, base)
    assert attention.use(model), attention.reason(model)
    torch.manual_seed(1)
    return weft.adapt(model, method).train()


def groups_of(rows: str, vocabulary: int, width: int, micro: int) -> list[list[Any]]:
    rng = np.random.default_rng(0)

    def example(n: int, i: int) -> Example:
        bears = rng.random(n) < 0.5
        bears[-1] = True
        return Example(ids=rng.integers(3, vocabulary, n).astype(np.int32), bears=bears, row=i)

    def batch(step: int) -> Any:
        if rows == "packed":
            lengths = [int(n) for n in rng.integers(200, 400, 5)]
            return filled(pack([example(n, i) for i, n in enumerate(lengths)]), 2048, 400).to(CARD)
        n = width // 2 if rows == "two" and step % 2 else width
        return replace(pad([example(n, i) for i in range(4)]), attention_mask=None).to(CARD)

    return [[batch(step) for _ in range(micro)] for step in range(STEPS)]


def train(name: str, graphs: bool | None) -> dict[str, Any]:
    """Ten steps: their losses, the parameters, peaks, seconds of a step and of the host."""
    shape, base, method, rows, micro = TRIED[name]
    model = model_of(shape, base, method)
    groups = groups_of(rows, shape["vocab_size"], 2048 if shape is WIDE else 512, micro)
    parameters = weft.adapters.trainable(model, "default")
    flat, said = Flat(parameters, method.lr_scale), []
    optimiser = AdamW(flat, (0.9, 0.999), 1e-8, 0.0)
    adapters = weft.adapters.attached(model, "default")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    fast = prepare(model, groups[0][0], parameters, memory=1.0, compile=True, graphs=graphs, varying=rows == "two", say=said.append)
    print(f"{fast.describe()}; {'; '.join([*said, *fast.said])}; {fast.compile_seconds:.1f} s"
          + (f"; no graphs: {fast.chain.why}" if fast.chain is not None and fast.chain.why else ""), flush=True)  # fmt: skip
    losses = []

    def step(group: list[Any], number: int) -> None:
        for batch in group:
            loss = fast.loss(batch) / batch.n_targets
            loss.backward()
            losses.append(loss.detach())
            del loss
        flat.clip(1.0)
        optimiser.step(1e-3)
        flat.touched()
        method.after_step(adapters, number, STEPS)
        flat.zero_grad()

    reset_peak_memory(CARD)
    for i, group in enumerate(groups):
        step(group, i)
    found = {"losses": torch.stack(losses), "parameters": flat.data.clone(), "peak": peak_memory(CARD), "captured": fast.captured,
             "kinds": 0 if fast.chain is None else len(fast.chain.graphs)}  # fmt: skip
    times, host = [], []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(groups[0], STEPS)
        host.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step(groups[0], STEPS)
        torch.cuda.synchronize()
    kernels = sum(e.device_time for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA) / 1e6
    found |= {"seconds": sorted(times)[5], "host": sorted(host)[5], "kernels": kernels}
    fast.close()
    flat.release()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    found["left"] = free - torch.cuda.mem_get_info()[0]
    return found


def check_graphs(check: Callable[[str, float, float], None], distance: Callable[[Any, Any], float]) -> None:
    for name in TRIED:
        plain, fast = train(name, False), train(name, None)
        check(f"CUDA graphs, {name}: captured", float(not fast["captured"] or plain["captured"]), 0.0)
        # The same kernels on the same numbers; sums that are taken in any order (atomic ones) may differ.
        check(f"CUDA graphs, {name}: losses of {STEPS} steps", distance(fast["losses"], plain["losses"]), 1e-3)
        check(f"CUDA graphs, {name}: parameters after them", distance(fast["parameters"], plain["parameters"]), 2e-2)
        print(f"  bit for bit: {torch.equal(fast['losses'], plain['losses']) and torch.equal(fast['parameters'], plain['parameters'])}; "
              f"{fast['kinds']} kinds of passes")  # fmt: skip
        more = (fast["peak"] - plain["peak"] - 1e8) / plain["peak"]  # 100 MB: workspaces of a stream of its own, static copies
        check(f"CUDA graphs, {name}: peak over that of layers one by one, 100 MB aside", more, 0.05)
        check(f"CUDA graphs, {name}: GB that closing leaves behind", fast["left"] / 1e9 - plain["left"] / 1e9, 0.1)
        for what, run in (("one by one", plain), ("as graphs", fast)):
            print(f"  {what}: {run['seconds'] * 1e3:.2f} ms a step, {run['kernels'] * 1e3:.2f} of them kernels, the host is done after "
                  f"{run['host'] * 1e3:.2f}; peak {run['peak'] / 1e6:.0f} MB", flush=True)  # fmt: skip
    changed(check, distance)
    broken_off(check, distance)


def changed(check: Callable[[str, float, float], None], distance: Callable[[Any, Any], float]) -> None:
    """What somebody does to the layers after a capture is in the next pass: the gradients are those of layers one by one."""

    def other_weights(layer: Any) -> None:
        up, q = layer.mlp.up_proj, layer.self_attn.q_proj
        up.weight.data = up.weight.data.flip(0).clone()
        q.weight = torch.nn.Parameter(q.weight.flip(1).clone(), requires_grad=False)

    def written_to(layer: Any) -> None:
        layer.mlp.down_proj.weight.mul_(1.5)

    def other_scale(layer: Any) -> None:
        layer.self_attn.o_proj.plan.scale *= 3

    found: dict[bool, list[torch.Tensor]] = {}
    for graphs in (True, False):
        model = model_of(SMALL, "bf16", weft.LoRA(rank=8))
        parameters, (batch,) = weft.adapters.trainable(model, "default"), groups_of("full", 1000, 512, 1)[0]
        flat, said = Flat(parameters, lambda name: 1.0), []
        flat.data.normal_(0, 0.05)
        fast = prepare(model, batch, parameters, memory=1.0, compile=True, graphs=graphs, varying=False, say=said.append)
        found[graphs] = []
        for change in (other_weights, written_to, other_scale):
            with torch.no_grad():
                change(repeated(model)[2])
            for _ in range(3):  # layer by layer, as a capture, as a replay of that
                flat.zero_grad()
                (fast.loss(batch) / batch.n_targets).backward()
                found[graphs].append(flat.grad.clone())
            if graphs:
                check(f"CUDA graphs, {change.__name__}: captured again", float(not fast.captured), 0.0)
        fast.close()
        flat.release()
    worst = max(distance(a, b) for a, b in zip(found[True], found[False], strict=True))
    least = min(distance(a, b) for a, b in pairwise(found[True][::3]))
    check("CUDA graphs, layers that are changed after a capture: gradients", worst, 1e-3)
    check("  each change is one", float(least < 1e-2), 0.0)


def broken_off(check: Callable[[str, float, float], None], distance: Callable[[Any, Any], float]) -> None:
    """A layer that reads a number from the card cannot be captured: layers run one by one, and allocator and random numbers are well."""
    model = model_of(SMALL, "bf16", weft.LoRA(rank=8))
    layer = repeated(model)[1].input_layernorm
    own = type(layer).forward

    @torch.compiler.disable
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return own(self, x) + 0.0 * x.detach().flatten()[0].item()

    type(layer).forward = forward
    try:
        parameters, (batch,) = weft.adapters.trainable(model, "default"), groups_of("full", 1000, 512, 1)[0]
        flat, said = Flat(parameters, lambda name: 1.0), []
        fast = prepare(model, batch, parameters, memory=1.0, compile=True, varying=False, say=said.append)
        print(fast.describe(), said, fast.chain and fast.chain.why)
        told = fast.chain is not None and "capturing them failed" in fast.chain.why
        check("CUDA graphs, a capture that breaks off: layers one by one", float(fast.captured or not told), 0.0)
        check("  and all else goes on", float(not fast.compiled or bool(said)), 0.0)
        before = torch.rand(8, device=CARD)
        seen = []
        for _ in range(3):
            loss = fast.loss(batch) / batch.n_targets
            loss.backward()
            seen.append(flat.grad.clone())
            flat.zero_grad()
        check("  gradients afterwards, twice the same", distance(seen[2], seen[1]), 1e-3)
        check("  random numbers go on", float(torch.equal(before, torch.rand(8, device=CARD))), 0.0)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            t = torch.ones(1 << 20, device=CARD)
        t.record_stream(torch.cuda.current_stream())  # what the allocator puts off while it believes in a capture
        del t
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.empty(8, device=CARD)
        check("  the allocator takes memory back", float(torch.cuda.memory_allocated() > held), 0.0)
        fast.close()
    finally:
        type(layer).forward = own
