"""`combine_factors` against peft's add_weighted_adapter: the same factors, layer by layer, and the same dice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import weft
from tests.conftest import gpt2, jolt, llama
from tests.parity.test_lora import pytestmark  # noqa: F401 (peft's own warnings)
from weft.adapters import attached, combine_factors

CASES: list[tuple[str, Callable[[], nn.Module], dict[str, Any]]] = [
    ("linear", llama, {}),
    ("linear", gpt2, {}),
    ("cat", llama, {}),
    ("svd", gpt2, dict(svd_rank=3)),
    ("svd", llama, {}),
    ("svd", llama, dict(svd_rank=5, svd_clamp=0.95)),
    ("svd", llama, dict(svd_rank=12)),  # more than the parts have together
    ("ties", llama, dict(density=0.4)),
    ("ties", llama, dict(density=0.4, majority_sign_method="frequency")),
    ("ties_svd", llama, dict(density=0.4)),
    ("magnitude_prune", llama, dict(density=0.3)),
    ("magnitude_prune_svd", gpt2, dict(density=0.3)),
    ("dare_linear", llama, dict(density=0.6)),
    ("dare_ties", llama, dict(density=0.6)),
    ("dare_linear_svd", llama, dict(density=0.6)),
    ("dare_ties_svd", llama, dict(density=0.6)),
]


@pytest.mark.parametrize(("how", "make", "options"), CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_the_numbers_are_peft_s(how: Any, make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path) -> None:
    base = make()
    targets = ["q_proj", "down_proj", "embed_tokens"] if make is llama else ["c_attn", "c_fc"]
    configs = [peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=make is gpt2) for alpha in (6, 3)]
    theirs = peft.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="x").eval()
    theirs.add_adapter("y", configs[1])
    for name in "xy":
        theirs.set_adapter(name)
        jolt(theirs, 0.3, ord(name))
    theirs.save_pretrained(tmp_path, selected_adapters=["x", "y"])
    ours = copy.deepcopy(base)
    for name in "xy":
        weft.load(ours, tmp_path / name, name)
    weights = [0.7, -0.4]
    before_draws: list[torch.Tensor] = []
    if "dare" in how:  # peft draws new factors before it draws what to drop; from there on the dice must fall alike
        real = theirs.base_model.inject_adapter

        def inject(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            before_draws.append(torch.get_rng_state())

        theirs.base_model.inject_adapter = inject
    torch.manual_seed(0)
    theirs.add_weighted_adapter(["x", "y"], weights, "both", how, **options)
    if before_draws:
        torch.set_rng_state(before_draws[0])
    words = {"svd_rank": "rank", "svd_clamp": "clamp", "majority_sign_method": "majority", "density": "density"}
    combine_factors(ours, ["x", "y"], weights, "both", how, **{words[k]: v for k, v in options.items()})
    mine = {f"{p}.{k}": v.detach() for p, a in attached(ours, "both").items() for k, v in a.named_parameters()}
    compared = 0
    for path, part in attached(ours, "both").items():
        layer: Any = theirs.base_model.model.get_submodule(path)
        A, B = (
            (layer.lora_embedding_A["both"], layer.lora_embedding_B["both"])
            if "both" in layer.lora_embedding_A
            else (layer.lora_A["both"].weight, layer.lora_B["both"].weight)
        )
        assert part.scale == layer.scaling["both"] == 1
        got = mine[f"{path}.B"] @ mine[f"{path}.A"]
        assert torch.allclose(got, (B @ A).detach(), atol=2e-5), path
        if "svd" not in how:
            assert torch.allclose(mine[f"{path}.A"], A, atol=1e-6) and torch.allclose(mine[f"{path}.B"], B, atol=1e-6)
        compared += 1
    assert compared == len(attached(ours, "x"))


def test_ranks_that_differ_are_refused() -> None:
    model = weft.adapt(weft.adapt(llama(), weft.LoRA(rank=2), "x"), weft.LoRA(rank=3), "y")
    with pytest.raises(weft.WeftError, match=r"the parts need one rank, not \[2, 3\]; use cat or svd"):
        combine_factors(model, ["x", "y"], [1, 1], "both", "linear")
    with pytest.raises(weft.WeftError, match="2 adapters and 1 weights"):
        combine_factors(model, ["x", "y"], [1], "both", "linear")
    with pytest.raises(weft.WeftError, match="how='mean': write one of"):
        combine_factors(model, ["x", "y"], [1, 1], "both", "mean")  # type: ignore[arg-type]
    with pytest.raises(weft.WeftError, match="needs a density"):
        combine_factors(model, ["x", "y"], [1, 1], "both", "ties")
