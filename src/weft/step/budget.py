"""What the compiler goes by when it chooses, within a budget of memory, what a layer keeps for its backward pass: time.

By itself it counts arithmetic alone, and so takes the thin products of adapters (S = x Aᵀ) for as cheap to make again as any of their size.
They read all of x for 0.2% of its bytes: kept, they spare more time for their memory than anything else.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as aot
from torch import Tensor, fx
from torch._functorch.partitioners import estimate_runtime
from torch._inductor.custom_graph_pass import CustomRuntimeEstimator, get_hash_for_files

FLOPS, BYTES = 7e14, 3e12  # a second, of an H100; only their ratio matters, and that is much the same on other cards


class Takes(CustomRuntimeEstimator):  # type: ignore[misc]
    """Seconds that an operation takes: its arithmetic or its traffic, whichever is longer."""

    def __call__(self, node: fx.Node) -> float:
        if node.target is torch.ops.weft.keep.default:
            return self(_maker(node.args[0]))
        if node.target is operator.getitem:  # one of several results, which torch's own estimate cannot take
            return self(node.args[0])
        with aot.patch(activation_memory_budget_runtime_estimator="flops"):
            flops = estimate_runtime(node)
        return max(flops / FLOPS, (sum(map(_bytes, node.all_input_nodes)) + _bytes(node)) / BYTES)

    def uuid(self) -> Any:
        """Part of a compiled graph's key in the cache: it holds our operations' backward passes, and the rest of the key only names."""
        operations = sorted(Path(__file__).parents[1].glob("kernels/*.py"))
        return get_hash_for_files((__file__, *map(str, operations)))


def _maker(node: Any) -> fx.Node:
    """The operation behind one of several outputs."""
    return node.args[0] if "val" in node.args[0].meta and isinstance(node.args[0].meta["val"], tuple) else node  # type: ignore[no-any-return]


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return sum(t.numel() * t.element_size() for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor))
