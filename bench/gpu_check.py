"""Every fast path against its twin, on a GPU. CI has none: whoever touches kernels/, quant/, train/ or step/ runs and commits it.

    python bench/gpu_check.py [PART ...]      (about eleven minutes, most of them for compiling in graphs and fast_step, which come last)
    python bench/gpu_check.py --join a.json b.json      (parts that were run on several cards)

Needs a CUDA device and pytest. Fresh random inputs of awkward shapes every time; the bounds are stated beside each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save
from _gpu_experts import check_experts
from _gpu_graphs import check_graphs
from _gpu_stacked import check_stacked, check_stacked_fp8

import weft
from weft.adapters import attached
from weft.data import DataConfig, demo, load_rows, pack, pad, prepare
from weft.data.batches import filled
from weft.kernels.fp8_gemm import can_fp8, fp8_linear, fp8_product_reference, quantise_rows, transposed
from weft.kernels.gated import gated, gated_backward_reference, gated_reference
from weft.kernels.launch import kernels
from weft.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from weft.kernels.low_rank import low_rank_add, low_rank_add_reference
from weft.models import attention
from weft.quant import FORMATS, QuantLinear, dense
from weft.step import loss_sum
from weft.step import prepare as prepare_step
from weft.train import EvalConfig, Recipe, TrainConfig

CHECKS: list[dict[str, Any]] = []
DEVICE = "cuda"


def check(what: str, error: float, bound: float) -> None:
    CHECKS.append({"what": what, "error": error, "bound": bound, "ok": error <= bound})
    print(f"{'ok  ' if error <= bound else 'FAIL'} {what}: {error:.2e} (bound {bound:.0e})", flush=True)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖ in fp64; a NaN never passes."""
    a, b = a.detach().double(), b.detach().double()
    found = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
    return found if found == found else float("inf")


def low_rank() -> None:
    """The in-place product with its hand-written backward, against plain operations in fp64."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for rows, inside, outside, rank in ((1, 33, 17, 3), (257, 96, 130, 8), (1000, 1024, 640, 16)):
            made = [torch.randn(s, device=DEVICE) for s in ((rows, outside), (rows, inside), (rank, inside), (outside, rank))]
            y, x, A, B = (t.to(dtype) if i < 2 else t for i, t in enumerate(made))
            g = torch.randn(rows, outside, device=DEVICE).to(dtype)
            leaves = [t.clone().requires_grad_() for t in (x, A, B)]
            out = low_rank_add(y.clone(), *leaves, 0.7)
            out.backward(g)
            exact = [t.double().clone().requires_grad_() for t in (x, A, B)]
            want = low_rank_add_reference(y.double(), *exact, 0.7)
            want.backward(g.double())
            worst = max([distance(out, want), *(distance(a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))])
            check(f"low_rank_add {dtype} {rows}×{inside}→{outside} r={rank}: output and gradients", worst, bound)


def quantised() -> None:
    """Each packed format: the Triton kernel against the plain twin bit for bit, and a layer's output and gradient against its numbers'."""
    options: dict[str, list[dict[str, Any]]] = {"nf4": [{"block": b, "nested": n} for b in (32, 64, 4096) for n in (False, True)]}
    options["fp4"] = options["nf4"]
    for base in ("nf4", "fp4", "int8", "fp8", "fp8-block"):
        form, worst, layers = FORMATS[base], 0.0, 0.0
        for shape in ((1, 1), (33, 7), (48, 40), (3, 50, 96), (257, 1000), (1024, 2048)):
            weight = torch.randn(shape, device=DEVICE)
            for more in options.get(base, [{}]):
                held = form.pack(weight, **more)
                plain = {k: v.cpu() for k, v in held.items()}
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    same = torch.equal(form.unpack(held, shape, dtype).cpu(), form.unpack(plain, shape, dtype))
                    worst = max(worst, float(not same))
                if len(shape) == 2:
                    layer = QuantLinear.of(held, shape, base, torch.float32)
                    x = torch.randn(5, shape[1], device=DEVICE, requires_grad=True)
                    g = torch.randn(5, shape[0], device=DEVICE)
                    layer(x).backward(g)
                    W = dense(layer).double()
                    layers = max(layers, distance(layer(x), x.double() @ W.T), distance(x.grad, g.double() @ W))
        check(f"{base}: Triton against plain torch on the CPU, bit for bit", worst, 0.0)
        check(f"{base}: a layer's output and gradient against its numbers in fp64", layers, 1e-5)


def few_tokens() -> None:
    """x Wᵀ from packed bytes against the weight's numbers in fp64, twice the same, in a CUDA graph and compiled with an adapter on top."""
    forms: list[tuple[str, dict[str, Any]]] = [("nf4", {"block": b, "nested": n}) for b in (32, 64, 4096) for n in (False, True)]
    forms += [("fp4", {"block": 128}), ("int8", {}), ("fp8", {}), ("fp8-block", {})]
    bounds = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
    for base, options in forms:
        for dtype, bound in bounds.items():
            worst, varies = 0.0, False
            for shape in ((5, 32), (33, 96), (257, 1056), (1024, 2048), (515, 14336)):
                held = FORMATS[base].pack(torch.randn(shape, device=DEVICE), **options)
                W = FORMATS[base].unpack(held, shape, torch.float32).double()
                for leading in ((1, 1), (2,), (3, 1)) if dtype == torch.float32 else ((1, 1), (2,), (7, 1), (16,)):
                    x = torch.randn(*leading, shape[1], device=DEVICE).to(dtype)
                    got, again = (FORMATS[base].product(held, shape, x) for _ in range(2))
                    assert got is not None and again is not None
                    worst, varies = max(worst, distance(got, x.double() @ W.T)), varies or not torch.equal(got, again)
            check(f"few tokens, {base} {options} {dtype}: against fp64", worst, bound)
            check(f"few tokens, {base} {options} {dtype}: the same twice", float(varies), 0.0)
    for base in ("nf4", "int8", "fp8"):
        shape, tokens = (300, 544), (4, 1)
        held = FORMATS[base].pack(torch.randn(shape, device=DEVICE))
        model = torch.nn.Sequential(QuantLinear.of(held, shape, base, torch.bfloat16, torch.randn(300, device=DEVICE)))
        weft.adapt(model, weft.LoRA(rank=4, targets=("0",)))
        for p in weft.adapters.trainable(model, "default").values():
            p.data.normal_().mul_(0.1)
        x = torch.randn(*tokens, shape[1], device=DEVICE, dtype=torch.bfloat16)
        decoded = model(x.clone().requires_grad_()).detach()
        with torch.inference_mode():
            check(f"few tokens, {base}, an adapter on top: against decoding", distance(model(x), decoded), 1e-2)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
            y.zero_()
            graph.replay()
            check(f"few tokens, {base}, in a CUDA graph: against eager", distance(y, model(x)), 0.0)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True)(x)
            check(f"few tokens, {base}, compiled: against eager", distance(compiled, model(x)), 1e-2)


def adapters() -> None:
    """Merging against the forward pass, and rows through one batched product against one by one, on the embedded base."""
    for base, bound in (("fp32", 1e-4), ("bf16", 5e-2)):
        model = weft.load_base("embedded", base=base, device=DEVICE)
        for seed, name in enumerate("abc"):
            torch.manual_seed(seed)
            weft.adapt(model, weft.LoRA(rank=3 + seed), name=name)
            with torch.no_grad():
                for part in attached(model, name).values():
                    for p in part.parameters():
                        p.add_(0.02 * torch.randn_like(p))
        ids = torch.randint(10, 4000, (4, 37), device=DEVICE)
        owners = ["c", None, "a", "b"]
        with torch.no_grad():
            alone = []
            for i, name in enumerate(owners):
                with weft.using(model, name):
                    alone.append(model(ids[i : i + 1]).logits[0])
            with weft.rows(model, owners):
                check(f"mixed rows, {base}: one batched product against one by one", distance(model(ids).logits, torch.stack(alone)), bound)
            weft.use(model, "a")
            want = model(ids).logits
            weft.merge(model, "a")
            check(f"merged against forward, {base}", distance(model(ids).logits, want), bound)
            weft.unmerge(model)
            check(f"unmerged again, {base}: bit for bit", float(not torch.equal(model(ids).logits, want)), 0.0)


def experts() -> None:
    """A mixture's experts in grouped products, against all updates formed in fp32."""
    check_experts(check, distance, DEVICE)


def packed() -> None:
    """The loss and the gradients of a packed batch against its rows alone."""
    tokenizer = weft.load_tokenizer("embedded")
    with tempfile.TemporaryDirectory() as folder:
        path, _ = demo.write("records", folder, train=23, held_out=1)
        examples = prepare(load_rows(str(path)), tokenizer, DataConfig(train=str(path)), progress=False).examples
    for base, bound in (("fp32", 1e-5), ("bf16", 2e-2)):
        model = weft.load_base("embedded", base=base, device=DEVICE)
        assert attention.use(model), attention.reason(model)
        weft.adapt(model, weft.LoRA(rank=8))
        parameters = list(weft.adapters.trainable(model, "default").values())
        torch.manual_seed(1)
        with torch.no_grad():
            for p in parameters:
                p.add_(0.02 * torch.randn_like(p))

        def gradients(batches: list[Any]) -> tuple[float, list[torch.Tensor]]:
            for p in parameters:
                p.grad = None
            total = sum(loss_sum(model, b.to(DEVICE)) for b in batches)
            total.backward()
            return total.item(), [p.grad.clone() for p in parameters]

        whole, together = gradients([pack(examples)])
        alone, apart = gradients([pack([e]) for e in examples])
        check(f"packed against rows alone, {base}: loss", abs(whole - alone) / alone, bound)
        check(
            f"packed against rows alone, {base}: gradients",
            distance(torch.cat([g.flatten() for g in together]), torch.cat([g.flatten() for g in apart])),
            bound * 3,
        )


def gated_mlp() -> None:
    """The fused inside of gated MLPs and its backward pass against their twins in fp64."""
    bounds = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    for n, width, ranks in ((5, 7, (1, 2, 3)), (333, 1000, (8, 16, 20)), (1024, 3072, (16, 16, 16)), (2049, 14336, (64, 16, 33))):
        rg, ru, rd = ranks
        shapes = ((n, width), (n, rd), (n, width), (n, width), (n, rg), (width, rg), (n, ru), (width, ru), (rd, width))
        given = [torch.randn(s, device=DEVICE, dtype=torch.float64) / (4 if i > 3 else 1) for i, s in enumerate(shapes)]
        for dtype, bound in bounds.items():
            dh, dS, g, u, Sg, Bg, Su, Bu, A = (t.to(dtype) for t in given)
            for dora in (True, False):
                c = [1 + torch.rand(width, device=DEVICE)] if dora else []  # LoRA on gate, DoRA on up
                leaves = [t.detach().requires_grad_() for t in (g, u, Sg, Bg, Su, Bu, A, *c)]
                what, gelu = f"gated MLP {n}×{width}, ranks {ranks}, {dtype}{', DoRA' if dora else ''}", n % 2 == 0
                h, S = gated(*leaves[:7], None, *leaves[7:], gelu=gelu)
                got = torch.autograd.grad((h, S), leaves, (dh, dS))
                wide = [t.detach().double() for t in leaves]
                exact = gated_reference(*wide[:7], None, *wide[7:], gelu=gelu)
                dg, du, dBg, dBu, dA, _, dc = gated_backward_reference(dh.double(), dS.double(), *wide[:7], None, *wide[7:], gelu=gelu)
                dSg, dSu = dg @ wide[3], du @ wide[5]
                worst = max(map(distance, (h, S, *got), (*exact, dg, du, dSg, dBg, dSu, dBu, dA, *[dc] * dora)))
                check(f"{what}: worst of h, S and the gradients", worst, bound)
                wider = [torch.cat((t, torch.full_like(t[:, :5], torch.nan)), 1)[:, : t.shape[1]] for t in (dh, dS, g, u, Sg, Su)]
                dh_, dS_, g_, u_, Sg_, Su_ = (t.detach() for t in wider)
                room = torch.full((n, 2 * width + rg + ru + 16), torch.nan, device=DEVICE, dtype=dtype)
                *into, _ = room[:, 8:].split((width, width, rg, ru, 8), 1)
                factors = (Sg_, Bg.detach(), Su_, Bu.detach(), A.detach(), None, *([wide[7].float()] if dora else [None]), gelu)
                back = kernels("triton_gated_back").gated_backward_and_s_triton(dh_, dS_, g_, u_, *factors, *into)
                found = (*kernels("triton_gated").gated_triton(g_, u_, *factors), *back[:5], *back[7:], *[back[6]] * dora)
                worst = max(map(distance, found, (*exact, dg, du, dBg, dBu, dA, dSg, dSu, *[dc] * dora)))
                check(f"{what}: in columns of wider tensors", worst, bound)
                check("  what lies beside them is left alone", abs(int(room.isnan().sum()) - 16 * n), 0)


def fused_loss() -> None:
    """The head and its loss without logits, against all logits in fp64."""
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for tokens, width, vocabulary in ((1, 64, 257), (333, 256, 4099), (1500, 1024, 32001)):
            h = torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
            W = (torch.randn(vocabulary, width, device=DEVICE) * width**-0.5).to(dtype)
            targets = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
            targets[1::3] = -100
            exact = h.detach().double().requires_grad_()
            want = linear_cross_entropy_reference(exact, W.double(), targets)
            want.backward()
            got = linear_cross_entropy(h, W, targets, rows=256)
            got.backward()
            worst = max(distance(got, want), distance(h.grad, exact.grad))
            check(f"linear_cross_entropy {dtype} {tokens}×{width}→{vocabulary}: loss and gradient", worst, bound)


def fp8() -> None:
    """fp8 products against the same fp8 numbers multiplied in fp32 (the twin), and against the weight before rounding."""
    if not can_fp8(torch.device(DEVICE)):
        return
    for tokens, inside, outside in ((1, 64, 32), (257, 512, 1040), (1000, 4096, 1024)):
        x = torch.randn(tokens, inside, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        W, g = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in ((outside, inside), (tokens, outside)))
        held = FORMATS["fp8"].pack(W)
        w, scale = held["weight"], held["scale"]
        check(f"transposed {outside}×{inside}", float(not torch.equal(transposed(w).float(), w.float().T)), 0.0)
        y = fp8_linear(x, w, scale)
        (dx,) = torch.autograd.grad(y, x, g)
        one = torch.ones(1, inside, device=DEVICE)
        twins = (fp8_product_reference(*quantise_rows(x.detach()), w, scale.T, torch.float32),
                 fp8_product_reference(*quantise_rows(g.float() * scale.T), w.t(), one, torch.float32))  # fmt: skip
        for what, got, twin, plain in zip(("y", "dX"), (y, dx), twins, (x @ W.T, g @ W), strict=True):
            check(f"fp8_linear {tokens}×{inside}→{outside}: {what} against its twin", distance(got, twin), 1e-2)
            check(f"fp8_linear {tokens}×{inside}→{outside}: {what} against bf16", distance(got, plain), 6e-2)


def fast_step() -> None:
    """The whole fast step at every level of memory against the plain step, on the embedded base: full and packed rows."""
    tokenizer = weft.load_tokenizer("embedded")
    with tempfile.TemporaryDirectory() as folder:
        path, _ = demo.write("records", folder, train=23, held_out=1)
        examples = prepare(load_rows(str(path)), tokenizer, DataConfig(train=str(path)), progress=False).examples
    tried = {
        "bf16": (("packed", 1.0), ("packed", 0.75), ("padded", 0.75), ("padded", 0.4), ("packed", 0.0)),
        "nf4": (("packed", 1.0), ("padded", 0.0)),
        "int8": (("padded", 0.1),),
        "fp8": (("packed", 1.0), ("padded", 0.0)),
        "fp32": (("padded", 1.0),),
    }
    for base, kinds in tried.items():
        for rows, level in kinds:
            model = weft.load_base("embedded", base=base, device=DEVICE)
            assert attention.use(model), attention.reason(model)
            weft.adapt(model, weft.LoRA(rank=8)).train()
            batch = (filled(pack(examples), 2048, 500) if rows == "packed" else pad(examples)).to(DEVICE)
            said: list[str] = []
            parameters, one_shape = weft.adapters.trainable(model, "default"), rows == "packed"
            how = {"memory": level, "compile": True, "varying": not one_shape, "fp8": base == "fp8"}
            fast = prepare_step(model, batch, parameters, **how, say=said.append)
            print("\n".join([*said, *fast.said]))
            check(f"fast step, {base}, {rows}, {level} of the activations kept: agrees", float(bool(said)), 0.0)
            fast.close()


def graphs() -> None:
    """Layers as CUDA graphs against the same layers one by one: ten steps of training, time and memory."""
    check_graphs(check, distance)


def stacked() -> None:
    """Layers of one input as one product, against fp64 and against layer by layer; where the kernels' time goes."""
    check_stacked(check, distance)


def stacked_fp8() -> None:
    """The same on an fp8 base."""
    if can_fp8(torch.device(DEVICE)):
        check_stacked_fp8(check, distance)


def training() -> None:
    """Twenty steps on the GPU against twenty on the CPU, in fp32."""
    tokenizer, losses = weft.load_tokenizer("embedded"), {}
    with tempfile.TemporaryDirectory() as folder:
        path, held = demo.write("dates", folder, train=200, held_out=20)
        for device in ("cpu", DEVICE):
            recipe = Recipe(
                method=weft.LoRA(rank=8, alpha=16), data=DataConfig(train=str(path), eval=str(held)), output=str(Path(folder) / device),
                train=TrainConfig(lr=2e-3, steps=20, tokens=512, log_every=1, device=device, progress="off"),
                eval=EvalConfig(start=False, rows=20, train_rows=0),
            )  # fmt: skip
            result = weft.fit(weft.load_base("embedded", base="fp32", device=device), recipe, tokenizer=tokenizer)
            losses[device] = torch.tensor([line["loss"] for line in result.history if "loss" in line])
    check("twenty training steps, GPU against CPU, fp32: losses", distance(losses[DEVICE], losses["cpu"]), 1e-3)


def tests() -> None:
    """The tests that have a GPU part."""
    root = Path(__file__).parent.parent
    places = [f"tests/{at}.py" for at in ("step/test_attention", "step/test_loss", "step/test_order", "train/test_flat", "train/test_cuda")]
    quiet = "ignore:`torch.jit:DeprecationWarning"  # what torch's own modules say of each other on a newer Python
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", quiet, *places]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root}"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    closing = (done.stdout.strip().splitlines() or ["no output"])[-1]
    print(closing, flush=True)
    if done.returncode:
        print("\n".join(line for line in done.stdout.splitlines() if re.match(r"E  |FAILED|ERROR", line))[-3000:])
    CHECKS.append({"what": f"pytest {' '.join(places)}: {closing}", "error": None, "bound": None, "ok": done.returncode == 0})


PARTS = (low_rank, quantised, few_tokens, gated_mlp, fused_loss, fp8, adapters, experts, packed, training, tests, graphs, stacked,
         stacked_fp8, fast_step)  # fmt: skip


def join(files: list[Path]) -> int:
    """Parts that were run on several cards of one machine, as one result; those of other commits than the first one's beside it."""
    found = [json.loads(f.read_text()) for f in files]
    if len({(f["machine"]["gpu"], f["versions"]["torch"]) for f in found}) > 1:
        raise SystemExit("these results are not of one card and torch")
    made = []
    for commit in dict.fromkeys(f["commit"] for f in found):
        of = [f for f in found if f["commit"] == commit]
        parts = {name: seconds for f in of for name, seconds in f["parts"].items()}
        left, checks = [p.__name__ for p in PARTS if p.__name__ not in parts], [c for f in of for c in f["checks"]]
        made.append(of[0] | {"ok": all(c["ok"] for c in checks) and not left, "parts": parts, "not_run": left, "checks": checks})
    place = Path(__file__).parent / "results" / "gpu_check.json"
    place.write_text(json.dumps(made[0] | ({"others": made[1:]} if made[1:] else {}), indent=2) + "\n")
    print(place)
    return 0 if made[0]["ok"] and all(c["ok"] for m in made for c in m["checks"]) else 1


def main() -> int:
    torch.backends.cuda.matmul.allow_tf32 = False
    every = [part.__name__ for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all, or of {', '.join(every)}")
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.join:
        return join(args.join)
    names = args.parts or every
    if unknown := {*names} - {*every}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    seconds: dict[str, float] = {}
    for part in PARTS:
        if part.__name__ not in names:
            continue
        started = time.perf_counter()
        try:
            part()
        except Exception as e:  # what one part meets is a finding, and the others are still to be seen
            traceback.print_exc()
            CHECKS.append({"what": f"{part.__name__}: {type(e).__name__}: {e}"[:400], "error": None, "bound": None, "ok": False})
        seconds[part.__name__] = round(time.perf_counter() - started, 1)
        ok = all(c["ok"] for c in CHECKS)  # a run that is cut off leaves what it found, and what it did not come to
        left = [p.__name__ for p in PARTS if p.__name__ not in seconds]
        print(save("gpu_check", {"ok": ok and not left, "parts": seconds, "not_run": left, "checks": CHECKS}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
