"""Fused experts computed one after another are what the module computes with W + s·BA in place of its parameters; no such sum is formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import weft
from tests.conftest import jolt
from weft.adapters import attached, trainable
from weft.methods.experts import grouped
from weft.methods.parameters import whole
from weft.quant import FORMATS, projections, quantise_, routable

EXPERTS = 5
KINDS: dict[str, Any] = {
    "Mixtral": (MixtralExperts, lambda w, i: transformers.MixtralConfig(hidden_size=w, intermediate_size=i, num_local_experts=EXPERTS)),
    "Qwen3-MoE": (Qwen3MoeExperts, lambda w, i: transformers.Qwen3MoeConfig(hidden_size=w, moe_intermediate_size=i, num_experts=EXPERTS)),
    # biases, transposed weights, gates and ups in turn
    "gpt-oss": (GptOssExperts, lambda w, i: transformers.GptOssConfig(hidden_size=w, intermediate_size=i, num_local_experts=EXPERTS)),
    # no gate
    "Nemotron-H": (
        NemotronHExperts,
        lambda w, i: transformers.NemotronHConfig(hidden_size=w, moe_intermediate_size=i, n_routed_experts=EXPERTS),
    ),
}
BASES: dict[str, dict[str, Any]] = {"plain": {}, "nf4": dict(block=32), "fp4": dict(block=32, nested=False), "int8": {}, "fp8-block": {}}


class Holder(nn.Module):
    """Experts where a model would have them."""

    def __init__(self, kind: str, width: int, inside: int, base: str = "plain") -> None:
        super().__init__()
        make, config = KINDS[kind]
        made = config(width, inside)
        made._experts_implementation = "eager"
        self.experts = make(made)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.3)
        if base != "plain":
            quantise_(self, base, **BASES[base])

    def forward(self, *inputs: Tensor) -> Tensor:
        y: Tensor = self.experts(*inputs)
        return y


def adapted(model: Holder, names: Sequence[str], ranks: Sequence[int]) -> list[Any]:
    for i, rank in enumerate(ranks):
        weft.adapt(model, weft.LoRA(rank=rank, alpha=3, targets=(), target_parameters=tuple(f"experts.{n}" for n in names)), name=f"a{i}")
        jolt(nn.ModuleList(attached(model, f"a{i}").values()), size=0.2, seed=i)
    weft.use(model, [f"a{i}" for i in range(len(ranks))])
    return [attached(model, f"a{i}")["experts"] for i in range(len(ranks))]


def inputs(tokens: int, k: int, width: int, among: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.stack([torch.randperm(among)[:k] for _ in range(tokens)])
    return torch.randn(tokens, width, dtype=dtype, requires_grad=True), chosen, torch.rand(tokens, k, requires_grad=True)


def gradients(model: Holder, y: Tensor, given: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    (y.float() * weight).sum().backward()
    own = [*given, *(p for name in weft.adapters.names(model) for p in trainable(model, name).values())]
    found = []
    for p in own:
        assert p.grad is not None
        found.append(p.grad.clone())
        p.grad = None
    return found


def far(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).detach().norm() / b.float().detach().norm().clamp(min=1e-20))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), base=st.sampled_from(list(BASES)), which=st.sampled_from(["both", "first", "second"]),
    tokens=st.integers(1, 19), k=st.integers(1, 3), among=st.integers(3, EXPERTS),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=2), seed=st.integers(0, 99),
)  # fmt: skip
def test_expert_by_expert_equals_the_whole(
    kind: str, base: str, which: str, tokens: int, k: int, among: int, ranks: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    width, inside = (20, 13) if base in ("plain", "int8") else (64, 32 + 32 * (seed % 2))
    model = Holder(kind, width, inside, base)
    names = {"both": projections(model.experts), "first": projections(model.experts)[:1], "second": projections(model.experts)[1:]}[which]
    stack = adapted(model, names, ranks)
    x, _, weights = given = inputs(tokens, k, width, among)
    assert routable(model.experts, names, given)
    got, want = model(*given), whole(model.experts, stack, *given)
    assert far(got, want) < 1e-5
    weight = torch.randn(tokens, width)
    for mine, its in zip(*(gradients(model, y, (x, weights), weight) for y in (got, want)), strict=True):
        assert far(mine, its) < 1e-4


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_equal_the_whole(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Holder(kind, 16, 24).to(dtype)
    names = projections(model.experts)
    stack = adapted(model, names, [8, 16])
    x, chosen, weights = inputs(11, 2, 16, EXPERTS - 1, dtype)
    updates = {n: [a.factors(model.experts)[n] for a in stack] for n in names}
    got, want = grouped(model.experts, updates, x, chosen, weights), whole(model.experts, stack, x, chosen, weights)
    near = 1e-5 if dtype == torch.float32 else 0.03
    assert far(got, want) < near
    weight = torch.randn(11, 16)
    for mine, its in zip(*(gradients(model, y, (x, weights), weight) for y in (got, want)), strict=True):
        assert far(mine, its) < near


def test_experts_of_other_processes_add_nothing() -> None:
    torch.manual_seed(0)
    model = Holder("Mixtral", 20, 13)
    stack = adapted(model, ("gate_up_proj", "down_proj"), [2])
    x, chosen, weights = inputs(6, 2, 20, EXPERTS)
    chosen[:3, 0] = EXPERTS
    chosen[5] = EXPERTS
    elsewhere = chosen == EXPERTS
    want = whole(model.experts, stack, x, chosen.masked_fill(elsewhere, 0), weights.masked_fill(elsewhere, 0.0))
    assert far(model(x, chosen, weights), want) < 1e-6
    assert torch.equal(model(x[5:], chosen[5:], weights[5:]), torch.zeros(1, 20))


@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
def test_in_16_bits_and_under_autocast(base: str) -> None:
    torch.manual_seed(0)
    model = Holder("Qwen3-MoE", 64, 32, base)
    stack = adapted(model, ("gate_up_proj", "down_proj"), [3])
    x, chosen, weights = inputs(9, 2, 64, EXPERTS)
    exact = whole(model.experts, stack, x, chosen, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert far(model(x, chosen, weights), exact) < 0.02
    model.to(torch.bfloat16)
    got = model(x.bfloat16(), chosen, weights)
    assert got.dtype == torch.bfloat16 and far(got, exact) < 0.02


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, Tensor) and t.is_floating_point() and not func.is_view:
                self.numel = max(self.numel, t.numel())
        return made


@pytest.mark.parametrize("base", list(BASES))
def test_no_update_and_no_packed_parameter_is_ever_whole(base: str) -> None:
    torch.manual_seed(0)
    model = Holder("Qwen3-MoE", 64, 64, base)
    stack = adapted(model, ("gate_up_proj", "down_proj"), [1])
    given = inputs(7, 2, 64, EXPERTS)
    one, sizes = 128 * 64, {}
    for name, compute in (("routed", lambda: model(*given)), ("whole", lambda: whole(model.experts, stack, *given))):
        with Largest() as seen:
            compute().sum().backward()
        sizes[name] = seen.numel
    assert sizes["routed"] <= one < EXPERTS * one <= sizes["whole"]


def test_what_does_not_keep_the_contract_is_computed_as_a_whole() -> None:
    torch.manual_seed(0)

    class Own(MixtralExperts):
        def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:  # another computation than the contract's
            return x @ self.down_proj.sum(0)

    model = Holder("Mixtral", 20, 40)
    own = Own(KINDS["Mixtral"][1](20, 40))
    own.load_state_dict(model.experts.state_dict())
    model.experts = own
    adapted(model, ("down_proj",), [2])
    given = inputs(4, 2, 20, EXPERTS)
    y = model(*given)
    weft.merge(model)
    assert far(model(*given), y) < 1e-5
    straddling = Holder("Mixtral", 20, 13)
    quantise_(straddling, "nf4")
    adapted(straddling, ("down_proj",), [2])
    assert not routable(straddling.experts, ("down_proj",), given)
    y = straddling(*given)
    weft.merge(straddling)
    assert far(straddling(*given), y) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 4), blocks=st.integers(1, 600), block=st.sampled_from([32, 64]), kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_expert_of_four_bits_is_that_of_the_whole(experts: int, blocks: int, block: int, kind: str, nested: bool, seed: int) -> None:
    form = FORMATS[kind]
    w = torch.randn(experts, blocks, block, generator=torch.Generator().manual_seed(seed))
    held = form.pack(w, block=block, nested=nested)
    everything = form.unpack(held, w.shape, torch.float32)
    for e in range(experts):
        part = form.part(held, w.shape, e)
        assert part is not None and torch.equal(form.unpack(part, w.shape[1:], torch.float32), everything[e])
