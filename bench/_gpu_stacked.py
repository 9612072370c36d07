"""The part of gpu_check about layers of one input as one product: the operations against fp64, and compiled layers with and without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import weft
from weft.data import Example, pad
from weft.kernels.fp8_gemm import E4M3, fp8_linear, fp8_product, quantise_rows
from weft.kernels.fp8_stacked import fp8_stacked, fp8_stacked_reference
from weft.kernels.gated import gated_backward_reference, gated_reference
from weft.kernels.gated_stacked import columns, gated_stacked
from weft.kernels.low_rank_linear import low_rank_linear, low_rank_linear_reference
from weft.kernels.stacked import padded, stacked, stacked_reference
from weft.kernels.stacked_added import stacked_added, stacked_added_reference
from weft.models import attention
from weft.quant import FORMATS, quantise_
from weft.step import peak_memory, prepare, reset_peak_memory
from weft.step.check import BOUNDS, differences, measure

Check = Callable[[str, float, float], None]
Distance = Callable[[Any, Any], float]
CARD = torch.device("cuda")
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOKENS, STEPS = (4, 2048), 3
SHAPES = {  # two layers of each
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64),
}
FP8_SHAPES = (  # tokens, in, outs, ranks
    (5, 32, (16, 48, 16), (3, 0, 1)), (192, 1024, (4096, 512, 512), (8, 8, 8)), (333, 1008, (512, 128, 128), (16, 8, 20)),
    (2049, 4096, (4096, 1024, 1024), (16, 16, 16)), (8192, 4096, (14336, 14336), (16, 16)), (1024, 2048, (8192, 8192), (64, 33)),
)  # fmt: skip
KINDS = {"nothing": (), "q, k, v": ("q_proj",), "gate, up": ("gate_proj",), "both": ("q_proj", "gate_proj"),
         "both, and o": ("q_proj", "gate_proj")}  # by a group's first name


def check_stacked(check: Check, distance: Distance) -> None:
    products(check, distance)
    lone(check, distance)
    insides(check, distance)
    for shape in SHAPES:
        layers(shape, check)


def check_stacked_fp8(check: Check, distance: Distance) -> None:
    products_in_fp8(check, distance)
    layers("8B", check, "fp8")


def products(check: Check, distance: Distance) -> None:
    """Layers of one input, by themselves and with their updates added."""
    for n, inside, outs, ranks in ((5, 24, (8, 24, 16), (3, 0, 1)), (333, 1000, (512, 128, 128), (16, 8, 20)),
                                   (2049, 4096, (4096, 1024, 1024), (16, 16, 16)), (1024, 2048, (8192, 8192), (64, 33))):  # fmt: skip
        width, R = sum(outs), padded(sum(ranks))
        for dtype, bound in BOUND.items():
            A = [torch.randn(r, inside, device=CARD).div(inside**0.5).to(dtype).float().requires_grad_() for r in ranks if r]
            below = torch.cat((*(a.detach() for a in A), torch.zeros(R - sum(ranks), inside, device=CARD))).to(dtype)
            base = (torch.randn(width, inside, device=CARD) / inside**0.5).to(dtype)
            x, D = torch.randn(n, inside, device=CARD, dtype=dtype), torch.randn(width, R, device=CARD).to(dtype) / 4
            D[:, sum(ranks) :] = 0
            dZ, both, added = torch.randn(n, width + R, device=CARD).to(dtype), [], []
            for wide in (dtype, torch.float64):
                leaves = [x.detach().to(wide).requires_grad_()]
                leaves += [a.detach().to(torch.promote_types(wide, torch.float32)).requires_grad_() for a in A]
                Z = (stacked if wide == dtype else stacked_reference)(leaves[0], torch.cat((base, below)).to(wide), leaves[1:])
                both.append([Z, *torch.autograd.grad(Z, leaves, dZ.to(wide))])
                leaves = [t.detach().to(wide).requires_grad_() for t in (x, below, D)]
                W = torch.full((width + R, inside + R), torch.nan, device=CARD, dtype=wide)
                W[:width, :inside] = base
                Z = (stacked_added if wide == dtype else stacked_added_reference)(leaves[0], W, *leaves[1:])
                dx, dA, dD = torch.autograd.grad(Z[:, :width], leaves, dZ[:, :width].to(wide))
                added.append([Z, dx, dA[: sum(ranks)], dD[:, : sum(ranks)]])
            for what, pair in (("stacked", both), ("stacked and added", added)):
                check(f"{what} {n}×{inside}→{outs}, ranks {ranks}, {dtype}", max(map(distance, *pair)), bound)


def lone(check: Check, distance: Distance) -> None:
    """A layer and its adapter as one operation."""
    for n, inside, out, rank in ((5, 24, 7, 3), (333, 1000, 512, 20), (2049, 4096, 4096, 16), (1024, 2048, 8192, 64)):
        for dtype, bound in BOUND.items():
            shapes = ((n, inside), (rank, inside), (out, rank), (out, inside), (n, out))
            x, A, D, W, dy = (torch.randn(s, device=CARD).div(s[1] ** 0.5).to(dtype) for s in shapes)
            results = []
            for wide, work in ((dtype, low_rank_linear), (torch.float64, low_rank_linear_reference)):
                leaves = [t.detach().to(wide).requires_grad_() for t in (x, A, D)]
                y = work(leaves[0], W.to(wide), *leaves[1:])
                results.append([y, *torch.autograd.grad(y, leaves, dy.to(wide))])
            check(f"lone layer {n}×{inside}→{out}, rank {rank}, {dtype}", max(map(distance, *results)), bound)


def products_in_fp8(check: Check, distance: Distance) -> None:
    """Against the twin, which multiplies in fp8 by itself; and that twin's own columns, where it writes into a wider tensor."""
    for n, inside, outs, ranks in FP8_SHAPES:
        width, R, bf16 = sum(outs), padded(sum(ranks)), torch.bfloat16
        what = f"stacked in fp8 {n}×{inside}→{outs}, ranks {ranks}"
        held = [FORMATS["fp8"].pack(torch.randn(out, inside, device=CARD) / inside**0.5) for out in outs]
        W = torch.cat([h["weight"].view(torch.uint8) for h in held]).view(E4M3)
        scale = torch.cat([h["scale"] for h in held])
        x, D = torch.randn(n, inside, device=CARD, dtype=bf16), torch.randn(width, R, device=CARD).to(bf16) / 4
        q, q_scale = quantise_rows(x)
        wide = torch.full((n, width + R), torch.nan, device=CARD, dtype=bf16)
        y = fp8_product(q, q_scale, W, scale.T, bf16, out=wide[:, :width])
        check(f"{what}: into columns", distance(y, fp8_product(q, q_scale, W, scale.T, bf16)), 1e-3)
        check("  what lies beside them is left alone", abs(int(wide.isnan().sum()) - n * R), 0)
        A = [torch.randn(r, inside, device=CARD).div(inside**0.5).to(bf16).float().requires_grad_() for r in ranks if r]
        rows = torch.cat((*(a.detach() for a in A), torch.zeros(R - sum(ranks), inside, device=CARD))).to(bf16)
        D[:, sum(ranks) :] = 0
        dZ = torch.randn(n, width + R, device=CARD).to(bf16)
        for added in (D, None):
            given = dZ.clone()
            given[:, width + (sum(ranks) if added is None else 0) :] = 0
            leaves = [x.requires_grad_(), *A, *([] if added is None else [added.requires_grad_()])]
            found = []
            for work in (lambda *t: fp8_stacked(*t[:3], rows, *t[3:]), fp8_stacked_reference):
                Z = work(x, W, scale, A, added)
                grads = list(torch.autograd.grad(Z, leaves, given))
                if added is not None:
                    grads[-1] = grads[-1][:, : sum(ranks)]
                found.append([Z, *grads])
            check(f"{what}{', S alone' if added is None else ''}: worst of Z and its gradients", max(map(distance, *found)), BOUND[bf16])
        apart, parts = x.detach().requires_grad_(), dZ[:, :width].split(outs, 1)
        each = [fp8_linear(apart, h["weight"].view(E4M3), h["scale"]) for h in held]
        exact = sum(d.double() @ h["weight"].view(E4M3).double().mul(h["scale"]) for d, h in zip(parts, held, strict=True))
        dZ[:, width:] = 0
        (one,) = torch.autograd.grad(fp8_stacked(apart, W, scale, rows, A), apart, dZ)
        (by_layer,) = torch.autograd.grad(each, apart, parts)
        print(f"  dx from exact: {distance(one, exact):.4f} in one product, {distance(by_layer, exact):.4f} layer by layer")
        check(f"{what}: dx against exact", distance(one, exact), 6e-2)


def insides(check: Check, distance: Distance) -> None:
    for n, width, (rg, ru, rd) in ((5, 8, (1, 2, 3)), (333, 1000, (8, 16, 20)), (2049, 14336, (16, 16, 16))):
        R = padded(rg + ru)
        exact = [torch.randn(s, device=CARD, dtype=torch.float64) / (4 if i else 1)
                 for i, s in enumerate(((n, 2 * width + R), (width, rg), (width, ru), (rd, width)))]  # fmt: skip
        c, given = 1 + torch.rand(width, device=CARD), [torch.randn(n, k, device=CARD) for k in (width, rd)]
        for dtype, bound in BOUND.items():
            leaves = [*(t.to(dtype).requires_grad_() for t in exact), c.clone().requires_grad_()]
            dh, dS = (t.to(dtype) for t in given)
            out = gated_stacked(*leaves[:4], None, leaves[4], gelu=n == 333)
            got = (*out, *torch.autograd.grad(out, leaves, (dh, dS)))
            Z, Bg, Bu, A, cu = (t.detach().double() for t in leaves)
            g, u, Sg, Su, _ = columns(Z, Bg, Bu)
            h, S = gated_reference(g, u, Sg, Bg, Su, Bu, A, None, cu, n == 333)
            dg, du, dBg, dBu, dA, _, dc = gated_backward_reference(dh.double(), dS.double(), g, u, Sg, Bg, Su, Bu, A, None, cu, n == 333)
            dZ = torch.cat((dg, du, dg @ Bg, du @ Bu, torch.zeros(n, R - rg - ru, device=CARD, dtype=torch.float64)), 1)
            error = max(map(distance, got, (h, S, dZ, dBg, dBu, dA, dc)))
            check(f"gated MLP of stacked products {n}×{width}, {dtype}: worst of h, S and 5 gradients", error, bound)


def layers(shape: str, check: Check, base: str = "bf16") -> None:
    """Two layers: loss and gradients with stacking against without, how long a layer's kernels take and how many they are."""
    import transformers

    config = transformers.LlamaConfig(**SHAPES[shape], num_hidden_layers=2, vocab_size=2000, max_position_embeddings=4096)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with CARD:
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if base != "bf16":
        quantise_(model, base)
        shape = f"{shape} {base}"
    assert attention.use(model.requires_grad_(False)), attention.reason(model)
    weft.adapt(model, weft.LoRA(rank=16)).train()
    parameters = weft.adapters.trainable(model, "default")
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.01 * torch.randn_like(p))
            p.grad = torch.zeros_like(p)
    weights = {name: t.clone() for name, t in frozen(model)}
    rng, (rows, length) = np.random.default_rng(0), TOKENS
    examples = [Example(ids=rng.integers(3, 2000, length).astype(np.int32), bears=np.ones(length, bool), row=i) for i in range(rows)]
    batch, said = replace(pad(examples), attention_mask=None).to(CARD), []
    held = torch.cuda.memory_allocated()
    fast = prepare(model, batch, parameters, memory=1.0, graphs=False, varying=False, say=said.append)
    print(fast.describe(), *said, *fast.said, sep="\n  ")
    fp8 = all(stack.fp8 for stack in fast.inside.stacks.values()) and len(fast.narrow) == 14
    check(f"stacked layers, {shape}: products in fp8", float(fp8 != (base == "fp8")), 0.0)
    check(f"stacked layers, {shape}: chosen, and agree", float(len(fast.inside.stacks) != 4 or bool(said)), 0.0)
    every, lone, found = fast.inside.stacks, fast.inside.lone, {}
    for kind, firsts in KINDS.items():
        if "o" in kind.split() and not lone:
            continue  # in fp8 it is as it was
        fast.close()
        fast.inside.stacks = {m: stack for m, stack in every.items() if stack.names[0] in firsts}
        fast.inside.lone = lone if "o" in kind.split() else {}
        fast.install(1.0)
        measure(model, [batch], fast.loss, parameters)  # compiles
        found[kind] = measure(model, [batch], fast.loss, parameters)
        seen = profiled(lambda: measure(model, [batch], fast.loss, parameters))
        time, count = (sum(values) / STEPS for values in zip(*seen.values(), strict=True))
        print(f"{shape}, {kind} stacked: {time:.3f} ms of kernels a step of two layers, {count:.0f} kernels; "
              f"peak {(peak_memory(CARD) - held) / 1e6:.0f} MB over what is held", flush=True)  # fmt: skip
        if kind in ("nothing", "both", "both, and o"):
            for name, (t, n) in sorted(seen.items(), key=lambda item: -item[1][0])[:24]:
                print(f"    {t / STEPS:8.3f} ms {n / STEPS:5.1f} × {name[:150]}")
            copies = {name: t for name, (t, _) in seen.items() if "cat" in name or "copy" in name.lower()}
            print(f"  {sum(copies.values()) / STEPS:.3f} ms in {len(copies)} kernels that copy or lay side by side, by their names")
        if kind != "nothing":
            how, wrong = differences(found[kind], found["nothing"], BOUNDS["16 bit"])
            print(f"  {how}")
            check(f"stacked layers, {shape}, {kind}: loss and gradients against layer by layer", float(bool(wrong)), 0.0)
    fast.close()
    same = all(torch.equal(t, weights[name]) and t.untyped_storage().nbytes() == t.nbytes for name, t in frozen(model))
    check(f"stacked layers, {shape}: weights afterwards, bit for bit and of their own memory", float(not same), 0.0)


def frozen(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The base's weights and their scales."""
    scales = [(name, t) for name, t in model.named_buffers() if name.endswith("weight_scale")]
    return [(name, p) for name, p in model.named_parameters() if not p.requires_grad] + scales


def profiled(step: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Name of a kernel -> (ms, how many) of STEPS steps; the peak of memory is theirs."""
    step()
    reset_peak_memory(CARD)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for e in seen.events():
        if e.device_type == torch.autograd.DeviceType.CUDA:
            times[e.name] += e.device_time / 1e3  # type: ignore[assignment]
            counts[e.name] += 1
    return {name: (t, counts[name]) for name, t in times.items()}
