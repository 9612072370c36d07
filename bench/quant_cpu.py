"""On a CPU: a 4-bit linear layer's forward pass, and forward and backward, over those of fp32, weft beside bitsandbytes.

    python bench/quant_cpu.py [--width 2048] [--threads 2]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import _common

from weft.quant import quantise_


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    plain = nn.Linear(args.width, args.width, bias=False).requires_grad_(False)
    ours = nn.Sequential(nn.Linear(args.width, args.width, bias=False).requires_grad_(False))
    ours.load_state_dict({"0.weight": plain.weight})
    quantise_(ours, "nf4")
    layers: dict[str, nn.Module] = {"fp32": plain, "weft nf4": ours}
    try:
        import bitsandbytes

        theirs = bitsandbytes.nn.Linear4bit(
            args.width, args.width, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True
        )
        theirs.load_state_dict({"weight": plain.weight})
        layers["bitsandbytes nf4"] = theirs.to("cpu").requires_grad_(False)
    except ImportError:
        print("bitsandbytes is not installed: left out")

    rows = []
    for tokens in (1, 32, 512):
        x = torch.randn(tokens, args.width)

        def forward(layer: nn.Module, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                layer(x)

        def both(layer: nn.Module, x: torch.Tensor = x) -> None:
            layer(x.clone().requires_grad_()).backward(torch.ones_like(x))

        for what, work in (("forward", forward), ("forward and backward", both)):
            seconds = _common.interleaved({n: (lambda w=work, m=m: w(m)) for n, m in layers.items()}, repeat=args.repeat)
            over = {n: s / seconds["fp32"] for n, s in seconds.items()}
            rows.append({"tokens": tokens, "what": what, "milliseconds": {n: 1e3 * s for n, s in seconds.items()}, "over_fp32": over})
            print(tokens, what, {n: f"{1e3 * seconds[n]:.2f} ms, x{over[n]:.2f}" for n in layers})
    result = {"what": "one linear layer, fp32 activations", "width": args.width, "rows": rows}
    print(_common.save("quant_cpu", result, ("torch", "bitsandbytes")))


if __name__ == "__main__":
    main()
