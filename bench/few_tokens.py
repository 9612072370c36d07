"""x Wᵀ for a few tokens on a packed base: from its bytes, by decoding, by bitsandbytes, and with W in bf16.

    python bench/few_tokens.py            # bench/results/few_tokens.json; under a minute on an H100

Microseconds of a call in bf16, and GB/s of packed bytes read once. Each figure is the median of replays of a CUDA graph that goes through
copies of the weight which together are larger than the L2 cache, so that every call reads from memory and the host's part is not in it
(bitsandbytes' calls too); "eager_us" is with it, one call after another. The tables of configurations are what the defaults of
`weft.kernels.triton_few_tokens`, and `FEW`, are chosen from.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import save
from torch.nn import functional as F

from weft.kernels import triton_few_tokens as triton_side
from weft.kernels.few_tokens import operands_4bit, operands_8bit
from weft.quant import FORMATS, QuantLinear

DEVICE = torch.device("cuda")
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 2, 4, 8, 16, 32)
FORMS = {"nf4+dq": ("nf4", {}), "nf4": ("nf4", {"nested": False}), "int8": ("int8", {}), "fp8": ("fp8", {})}
L2 = 50 << 20  # bytes of an H100's
ONE = [dict(zip(("rows", "groups", "warps"), c, strict=True)) for c in (
    (1, 128, 4), (2, 128, 4), (4, 128, 4), (8, 128, 4), (4, 32, 4), (8, 32, 4), (4, 64, 4), (4, 64, 2), (2, 32, 1))]  # fmt: skip
FEW = [dict(zip(("rows", "groups", "warps", "stages"), c, strict=True)) for c in (
    (16, 16, 8, 3), (16, 16, 8, 1), (16, 16, 8, 4), (16, 16, 4, 3), (16, 8, 4, 4), (16, 32, 16, 2), (32, 16, 8, 3), (32, 8, 8, 3),
    (64, 8, 8, 3))]  # fmt: skip
SWEPT = {("nf4+dq", shape) for shape in SHAPES} | {("fp8", (4096, 4096)), ("fp8", (14336, 4096))}  # each takes a second to compile for


Work = Callable[[int], Any]  # one call, on the copy of this number


def microseconds(work: Work, copies: int, repeat: int = 9) -> float:
    """Of one call: the median of replays of a graph with a call on each copy, over again where they are few."""
    calls = [i % copies for i in range(max(copies, 12))]
    for i in range(2):
        work(i % copies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in calls:
            work(i)
    times = []
    for _ in range(repeat + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(times[2:])[repeat // 2]


def eager(work: Work, copies: int, calls: int = 100) -> float:
    """Microseconds of one call as Python makes them, the host's work included."""
    work(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        work(i % copies)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / calls


def copies_of(held: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """As many as are three times the L2 cache together."""
    size = sum(t.nbytes for t in held.values())
    return [{k: t.clone() for k, t in held.items()} for _ in range(-(-3 * L2 // size))]


def operands(base: str, held: dict[str, torch.Tensor], shape: tuple[int, int]) -> Any:
    if base == "nf4":
        return operands_4bit(held["weight"], held["absmax"], held.get("nested_absmax"), held.get("nested_offset"), base, *shape)
    return operands_8bit(held["weight"], held["scale"], *shape)


def theirs(weight: torch.Tensor, nested: bool, copies: int) -> list[Any]:
    """bitsandbytes' packed weight and its state, so many times; none without it."""
    if find_spec("bitsandbytes") is None:
        return []
    from bitsandbytes.functional import quantize_4bit

    return [quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested) for _ in range(copies)]


def their_times(packed: list[Any], x: torch.Tensor, with_eager: bool) -> dict[str, float | None]:
    if not packed:
        return {}
    import bitsandbytes as bnb

    def work(i: int) -> Any:
        return bnb.matmul_4bit(x, packed[i][0], quant_state=packed[i][1])

    found: dict[str, float | None] = {"eager_bitsandbytes_us": eager(work, len(packed))} if with_eager else {}
    try:
        return found | {"bitsandbytes_us": microseconds(work, len(packed))}
    except RuntimeError as e:  # should it ask the card for a number, which a graph cannot hold
        print(f"    bitsandbytes in a graph: {str(e)[:200]}")
        return found | {"bitsandbytes_us": None}


def tried(work: Any, configurations: list[dict[str, int]], x: torch.Tensor, packed: list[Any], outputs: int) -> dict[str, float]:
    """Configuration -> microseconds, the fastest first; without those that do not fit the card."""
    y, found = x.new_empty(len(x), outputs), {}
    for c in configurations:
        name = "/".join(map(str, c.values()))
        try:
            found[name] = microseconds(lambda i: work(x, packed[i][0], y, packed[i][1], **c), len(packed))
        except Exception as e:
            print(f"    {name}: {type(e).__name__}: {str(e)[:120]}", flush=True)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def summary(sweeps: list[dict[str, Any]]) -> None:
    """For each kernel and format: how much longer than the best of each case a configuration takes, on average."""
    for name, one in ((f, o) for f in FORMS for o in (True, False)):
        mine = [s["us"] for s in sweeps if s["format"] == name and (s["tokens"] == 1) == one]
        common = set.intersection(*(set(us) for us in mine)) if mine else set()
        mean = {c: sum(us[c] / min(us.values()) for us in mine) / len(mine) for c in common}
        table = "  ".join(f"{c} {mean[c]:.2f}" for c in sorted(mean, key=mean.__getitem__))
        print(f"{name}, {'one token' if one else 'several'}: {table}" if mine else "", end="\n" if mine else "")


def main() -> None:
    started, rows, sweeps = time.perf_counter(), [], []
    for shape in SHAPES:
        weight = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / 64
        plain = [weight.clone() for _ in range(max(2, -(-3 * L2 // weight.nbytes)))]
        for name, (base, options) in FORMS.items():
            held = copies_of(FORMATS[base].pack(weight, **options))
            copies, nbytes = len(held), sum(t.nbytes for t in held[0].values())
            layers = [QuantLinear.of(h, shape, base, torch.bfloat16) for h in held]
            packed = [operands(base, h, shape) for h in held]
            other = theirs(weight, name == "nf4+dq", copies) if base == "nf4" else []
            for tokens in TOKENS if name in ("nf4+dq", "fp8") else (1, 4, 16):
                x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.bfloat16)
                y = x.new_empty(tokens, shape[0])

                def one_token(i: int) -> Any:
                    return triton_side.one_token(x, packed[i][0], y, packed[i][1])

                def several(i: int) -> Any:
                    return triton_side.few_tokens(x, packed[i][0], y, packed[i][1])

                row: dict[str, Any] = {"shape": list(shape), "format": name, "tokens": tokens}
                with torch.inference_mode():
                    row["fused_us"] = microseconds(one_token if tokens == 1 else several, copies)
                    if tokens <= 4:
                        row["several_us" if tokens == 1 else "one_by_one_us"] = microseconds(several if tokens == 1 else one_token, copies)
                    row["decoded_us"] = microseconds(lambda i: layers[i].decoded(x), copies)
                    row["bf16_us"] = microseconds(lambda i: F.linear(x, plain[i]), len(plain))
                    row |= their_times(other, x, tokens in (1, 16))
                    if tokens in (1, 16):
                        row["eager_us"] = eager(lambda i: layers[i](x), copies)
                        row["eager_decoded_us"] = eager(lambda i: layers[i].decoded(x), copies)
                row |= {"fused_gb_per_s": nbytes / row["fused_us"] / 1e3, "share_of_decoded": row["fused_us"] / row["decoded_us"]}
                rows.append(row)
                print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
                if (name, shape) in SWEPT and tokens in (1, 4, 16):
                    work, configurations = (triton_side.one_token, ONE) if tokens == 1 else (triton_side.few_tokens, FEW)
                    found = tried(work, configurations, x, packed, shape[0])
                    sweeps.append({"shape": list(shape), "format": name, "tokens": tokens, "us": found})
                    print("    " + "  ".join(f"{c} {us:.1f}" for c, us in found.items()), flush=True)
    summary(sweeps)
    print(f"{time.perf_counter() - started:.0f} s")
    print(save("few_tokens", {"products": rows, "configurations": sweeps}, ("torch", "triton", "bitsandbytes")))


if __name__ == "__main__":
    main()
