"""The part of gpu_check.py on a mixture's experts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import weft
from weft.adapters import attached
from weft.methods.experts import grouped, way
from weft.methods.parameters import whole
from weft.quant import projections, quantise_, unpack_
from weft.quant.decoding import with_packed
from weft.quant.grouped import groupable


def check_experts(check: Callable[[str, float, float], None], distance: Callable[[Tensor, Tensor], float], device: str) -> None:
    """LoRA on a mixture's experts in grouped products, eager and compiled, and frozen packed experts, against all updates formed in fp32.

    Some experts have no token; gpt-oss has biases and turned weights; MXFP4 is read as gpt-oss's files have it.
    """
    kinds: dict[str, Any] = {
        "Qwen3-MoE": (Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=136, num_experts=16)),
        "gpt-oss": (GptOssExperts, GptOssConfig(hidden_size=256, intermediate_size=160, num_local_experts=16)),
    }
    compiled = (("Qwen3-MoE", "bf16", 1.0), ("Qwen3-MoE", "nf4", 0.2), ("gpt-oss", "fp8", 1.0))  # each takes some ten seconds
    for (kind, (make, config)), base in itertools.product(kinds.items(), ("bf16", "nf4", "fp4", "int8", "fp8", "fp8-block", "mxfp4")):
        if base == "mxfp4" and kind != "gpt-oss":
            continue
        config._experts_implementation = "eager"
        holder: Any = torch.nn.Module()
        holder.experts = make(config).to(device, torch.bfloat16).requires_grad_(False)
        for p in holder.experts.parameters():
            torch.nn.init.normal_(p, std=0.03)  # so that none of gpt-oss's activations are cut off, where gradients jump
        if base == "mxfp4":
            with_packed(holder.experts, *_mxfp4(holder.experts, device), base, torch.bfloat16)
        elif base != "bf16":
            quantise_(holder, base)
        exact = copy.deepcopy(holder)  # the same numbers in fp32
        unpack_(exact.experts)
        exact.float()
        for model in (holder, exact):
            for i, rank in enumerate((8, 16)):
                targets = tuple(f"experts.{n}" for n in projections(model.experts))
                weft.adapt(model, weft.LoRA(rank=rank, targets=(), target_parameters=targets), name=f"a{i}")
                torch.manual_seed(i)
                with torch.no_grad():
                    for p in attached(model, f"a{i}")["experts"].parameters():
                        p.copy_(0.05 * torch.randn_like(p))
        x = torch.randn(301, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.rand(301, 4, device=device, requires_grad=True)
        chosen, g = torch.rand(301, 11, device=device).topk(4).indices, torch.randn(301, 256, device=device)
        for names in ((), ("a0",), ("a0", "a1")):
            if not names and base == "bf16":  # the module's own business
                continue
            ways = {"eager": holder.experts}
            found = [level for k, b, level in compiled if (k, b) == (kind, base)] if names != ("a0",) else []
            for model in (holder, exact):
                weft.use(model, names or None)
            stack = [attached(exact, n)["experts"] for n in names]
            given = [p for n in names for p in attached(holder, n)["experts"].parameters()]
            twins = [p for n in names for p in attached(exact, n)["experts"].parameters()]
            y32 = whole(exact.experts, stack, *(x.float(), chosen, weights))
            want = [y32, *torch.autograd.grad(y32, [x, weights, *twins], g)]
            for level in found:
                torch._functorch.config.activation_memory_budget = level
                torch._dynamo.reset()
                ways[f"compiled, {level} of the activations kept"] = torch.compile(holder.experts._call_impl, dynamic=True, fullgraph=True)
            for name, run in ways.items():
                kept: list[Any] = []
                with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
                    y = run(x, chosen, weights)
                got = [y, *torch.autograd.grad(y, [x, weights, *given], g.to(y.dtype))]
                what = f"{kind} in {base}, {len(names)} adapters, {name}"
                check(f"{what}: output and gradients", max(map(distance, got, want)), 1.5e-2)
                own = {p.data_ptr() for p in holder.parameters()}
                large = [t for t in kept if t.is_floating_point() and t.dim() == 3 and t.shape[1:].numel() >= 256 * 136]
                check(f"{what}: decoded weights kept", float(len([t for t in large if t.data_ptr() not in own])), 0.0)
            torch._functorch.config.activation_memory_budget = 1.0
            updates = {n: [a.factors(holder.experts)[n] for a in stack] for n in projections(holder.experts)}
            able = way(holder.experts, updates, x) is grouped if names else groupable(holder.experts, x)
            check(f"{kind} in {base}, {len(names)} adapters: not grouped", float(not able), 0.0)


def _mxfp4(module: Any, device: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, torch.Size]]:
    """Random bytes in place of gpt-oss's parameters, which are (experts, columns, rows)."""
    shapes = {n: module._parameters[n].shape for n in projections(module)}
    made = {}
    for name, (experts, columns, rows) in shapes.items():
        weight = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, device=device)
        made[name] = {"weight": weight, "scale": torch.randint(117, 121, weight.shape[:-1], dtype=torch.uint8, device=device)}
    return made, shapes
