"""Fused experts computed one after another are what the module computes with W + s·BA in place of its parameters; no such sum is formed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
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
from weft.methods import experts
from weft.methods.parameters import whole
from weft.quant import FORMATS, grouped, projections, quantise_, routable, unpack_
from weft.quant.experts import one_by_one_pays

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


def far(a: Tensor, b: Tensor, least: float = 1e-20) -> float:
    return float((a.float() - b.float()).detach().norm() / b.float().detach().norm().clamp(min=least))


def furthest(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Of several; what is small beside the largest, as a sum whose terms cancel, is measured against a tenth of that."""
    least = 0.1 * max(float(t.detach().float().norm()) for t in want)
    return max(far(a, b, least) for a, b in zip(got, want, strict=True))


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
    assert furthest(*(gradients(model, y, (x, weights), weight) for y in (got, want))) < 1e-4


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), base=st.sampled_from(list(BASES)), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    which=st.sampled_from(["both", "first", "second"]), width=st.sampled_from([16, 40, 64]), inside=st.sampled_from([8, 24, 32]),
    tokens=st.integers(1, 19), k=st.integers(1, 3), among=st.integers(3, EXPERTS),
    ranks=st.lists(st.sampled_from([8, 16]), min_size=1, max_size=2), seed=st.integers(0, 99),
)  # fmt: skip
def test_grouped_products_equal_the_others(
    kind: str, base: str, dtype: torch.dtype, which: str, width: int, inside: int, tokens: int, k: int, among: int, ranks: list[int],
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = Holder(kind, width, inside, base).to(dtype)
    names = {"both": projections(model.experts), "first": projections(model.experts)[:1], "second": projections(model.experts)[1:]}[which]
    stack = adapted(model, names, ranks)
    x, _, weights = given = inputs(tokens, k, width, among, dtype)
    updates = {n: [a.factors(model.experts)[n] for a in stack] for n in names}
    ways = [experts.grouped(model.experts, updates, *given), whole(model.experts, stack, *given)]
    if one_by_one_pays(model.experts, x):  # in 4 bits blocks may straddle experts
        ways.append(experts.one_by_one(model.experts, updates, *given))
    near = 1e-4 if dtype == torch.float32 else 0.2  # the ways round elsewhere, and all of them lose what cancels
    wanted = (x, weights) if dtype == torch.float32 else (x,)  # the router's is one number a choice, in which most may cancel
    weight = torch.randn(tokens, width)
    got, *others = [[y, *gradients(model, y, wanted, weight)] for y in ways]
    assert all(furthest(got, want) < near for want in others)


class Kept:
    """What autograd keeps for a backward pass."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def pack(self, t: Tensor) -> Tensor:
        self.tensors.append(t)
        return t


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a card; grouped products work on a CPU too."""
    monkeypatch.setattr("weft.quant.grouped.has_grouped_products", lambda device: True)
    for place in ("weft.methods.experts", "weft.quant.decoding"):
        monkeypatch.setattr(f"{place}.one_by_one_pays", lambda module, x: False)


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("base", list(BASES))
def test_grouped_products_keep_no_decoded_weight(kind: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an adapter and, of packed experts, without one."""
    torch.manual_seed(0)
    model = Holder(kind, 64, 32, base).bfloat16()
    bare: Any = deepcopy(model.experts)
    unpack_(bare)
    x, chosen, weights = inputs(7, 2, 64, EXPERTS, torch.bfloat16)
    g = torch.randn(7, 64, dtype=torch.bfloat16)
    own, calls, compute = {p.data_ptr() for p in model.parameters()}, [], grouped.grouped

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return compute(*args)

    for place in ("weft.quant.decoding", "weft.quant.grouped"):
        monkeypatch.setattr(f"{place}.grouped", counted)
    for adapters in [0, 1, 2][base == "plain" :]:
        stack = adapted(model, projections(model.experts), [8] * adapters) if adapters else []
        want = whole(model.experts, stack, x, chosen, weights) if stack else bare(x, chosen, weights)
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            y = model(x, chosen, weights)
        assert len(calls) == 1 and far(y, want) < 0.05
        calls.clear()
        smaller = EXPERTS * 64 * 32  # of the two parameters
        assert not [t.shape for t in kept.tensors if t.is_floating_point() and t.numel() >= smaller and t.data_ptr() not in own]
        (dx,), (its,) = (torch.autograd.grad(made, [x], g) for made in (y, want))
        assert far(dx, its) < 0.05
        for name in weft.adapters.names(model):
            weft.remove(model, name)


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize(("width", "inside", "rank"), [(64, 32, 8), (20, 32, 8), (64, 12, 8), (64, 32, 4)])
@pytest.mark.parametrize("base", ["plain", "int8"])
def test_what_grouped_products_cannot_do_is_computed_as_a_whole(width: int, inside: int, rank: int, base: str) -> None:
    torch.manual_seed(0)
    able = not any(n % 8 for n in (width, inside, rank))
    model = Holder("Qwen3-MoE", width, inside, base).bfloat16()
    stack = adapted(model, ("gate_up_proj", "down_proj"), [rank])
    module, given = model.experts, inputs(6, 2, width, EXPERTS, torch.bfloat16)
    updates = {n: [a.factors(module)[n] for a in stack] for n in ("gate_up_proj", "down_proj")}
    assert (experts.way(module, updates, given[0]) is experts.grouped) == able
    want = whole(module, stack, *given)
    assert torch.equal(model(*given), want) or (able and far(model(*given), want) < 0.05)
    assert not grouped.groupable(module, given[0].float()) or base == "plain"  # a packed weight is decoded to the dtype of its input
    assert not grouped.groupable(module.float(), given[0].float())
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped.groupable(module, given[0].float()) == (base != "plain" and width == 64 and inside == 32)
    module.bfloat16()._is_expert_parallel = True
    assert not grouped.groupable(module, given[0])


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")  # what torch's compiler itself causes
@pytest.mark.parametrize(
    ("kind", "base", "backend", "ranks"),
    [("Mixtral", "plain", "aot_eager", [8, 16]), ("gpt-oss", "nf4", "aot_eager", [8]), ("Nemotron-H", "int8", "aot_eager", []),
     ("Qwen3-MoE", "nf4", "inductor", [16, 8])],
)  # fmt: skip
def test_compiled_experts_are_grouped_without_a_graph_break(kind: str, base: str, backend: str, ranks: list[int]) -> None:
    torch.manual_seed(0)
    model = Holder(kind, 64, 32, base).bfloat16()
    bare: Any = deepcopy(model.experts)
    unpack_(bare)
    stack = adapted(model, projections(model.experts), ranks)
    counted = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model._call_impl, backend=counted, fullgraph=True, dynamic=True)
    for tokens in (11, 26):
        x, _, weights = given = inputs(tokens, 2, 64, EXPERTS - 1, torch.bfloat16)
        weight = torch.randn(tokens, 64)
        others = whole(model.experts, stack, *given) if stack else bare(*given)
        got, want = ([y, *gradients(model, y, (x, weights), weight)] for y in (compiled(*given), others))
        assert furthest(got, want) < 0.05
    (graph,) = counted.graphs
    products = [n for n in graph.graph.nodes if n.op == "call_function" and "grouped_mm" in str(n.target)]
    assert len(products) == 2 + 4 * len(ranks) - (base != "plain") * 2  # a packed weight's product is inside of its Function


def test_for_the_compiler_a_device_has_grouped_products_or_not_for_good() -> None:
    """The mark is torch's own, set without what its decorator imports."""
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(marked) and vars(grouped.has_grouped_products) == vars(marked)


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
    assert not one_by_one_pays(straddling.experts, given[0])
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
