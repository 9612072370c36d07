"""All layers at once: with a capture that runs the layers again on the static tensors in the place of a card's."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.step.test_loss import build, rows
from weft.core import WeftError
from weft.data import join, pack, pad
from weft.data.batches import filled
from weft.models import attention, layout
from weft.step import capture as capture_module
from weft.step import fast as fast_module
from weft.step import graph, loss_sum, loss_sums, prepare
from weft.step.capture import Graphs, add_gradients
from weft.step.graph import Chain
from weft.step.regions import install, repeated, uninstall
from weft.step.routing import routed
from weft.train.flat import Flat


class Again(Graphs):
    """Runs the layers anew with every replay. As on a card, nothing but the static tensors and the parameters comes in."""

    def __init__(self, layers, x: Tensor, given: list[Tensor], trained: list[Tensor]) -> None:
        self.layers, self.x, self.given, self.trained = layers, x, given, trained
        out = layers()
        self.out, self.dx = torch.empty_like(out.detach()), torch.empty_like(x, requires_grad=False) if x.requires_grad else None
        self.grad = torch.zeros_like(self.out)
        add_gradients(out, self.grad, x, trained)
        self.calls = [0, 0]

    def forward(self) -> None:
        for t in self.given:  # what the CPU's attention has found out about rows; on a card that stays there
            layout._layouts.pop(t, None)
        with torch.enable_grad():
            self.live = self.layers()
        self.out.copy_(self.live)
        self.calls[0] += 1

    def backward(self) -> None:
        here = [p.grad for p, _ in self.sums]
        for p, g in self.sums:
            p.grad = g  # a graph knows addresses, not names
        dx = add_gradients(self.live, self.grad, self.x, self.trained)
        if self.dx is not None:
            self.dx.copy_(dx)
        for (p, _), g in zip(self.sums, here, strict=True):
            p.grad = g
        self.calls[1] += 1


class Fake:
    problem: Exception | None = None

    def __init__(self, device, insist) -> None:
        self.closed = False

    def capture(self, layers, x, given, trained):
        if self.problem is not None:
            raise self.problem
        return Again(layers, x, given, trained)

    def close(self, graphs) -> None:
        graphs.clear()


@pytest.fixture(autouse=True)
def _no_card(monkeypatch):
    monkeypatch.setattr(graph, "Card", Fake)
    monkeypatch.setattr(fast_module, "able", lambda device: True)


def adapted(kind="Llama", extra=None, method=None, layers=3):
    model = build(kind, {"num_hidden_layers": layers} | (extra or {}) if kind != "GPT2" else extra).requires_grad_(False)
    torch.manual_seed(1)
    weft.adapt(model, method or weft.LoRA(rank=3)).train()
    with torch.no_grad():
        for p in weft.adapters.trainable(model, "default").values():
            p.add_(0.05 * torch.randn_like(p))
    return model


def chained(model: nn.Module) -> Chain:
    chain = Chain()
    install(repeated(model), False, False, 0, False, 1.0, chain)
    return chain


def train(model: nn.Module, groups, chain: Chain | None, lr=0.3) -> list[Tensor]:
    """Losses of each step's micro-batches, and the parameters in the end."""
    flat = Flat(weft.adapters.trainable(model, "default"), lambda name: 1.0)
    seen: list[Tensor] = []
    for group in groups:
        for batch in group:
            loss = loss_sum(model, batch)
            (loss / 10).backward()
            seen.append(loss.detach())
            del loss
        with torch.no_grad():
            flat.data.sub_(lr * flat.grad)
        flat.touched()
        flat.zero_grad()
    if chain is not None:
        chain.stop("over")
    uninstall(repeated(model))
    return [*seen, flat.data.clone()]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), (a - b).abs().max()


METHODS = {
    "LoRA": weft.LoRA(rank=3), "DoRA": weft.DoRA(rank=3), "VeRA": weft.VeRA(rank=4), "IA3": weft.IA3(), "BitFit": weft.BitFit(add=True),
    "AdaLoRA": weft.AdaLoRA(rank=4, target_rank=2), "trained embedding": weft.LoRA(rank=3, targets=["embed_tokens", "q_proj", "down_proj"]),
}  # fmt: skip


@pytest.mark.parametrize(("method", "large"), [*((method, capture_module.LARGE) for method in METHODS), ("LoRA", 0)])
def test_steps_are_those_of_layers_one_by_one(monkeypatch, method, large):
    """Gradients are added all at once or, where they are large, one by one."""
    monkeypatch.setattr(capture_module, "LARGE", large)
    groups = [[pad(rows([9, 4, 7], seed=i))] for i in range(5)]
    groups = [[replace(b, attention_mask=None)] for g in groups for b in g]
    want = train(adapted(method=METHODS[method]), groups, None)
    model = adapted(method=METHODS[method])
    chain = chained(model)
    graphs: list[Again] = []
    capture = chain._captured
    chain._captured = lambda *a: graphs.append(made := capture(*a)) or made  # type: ignore[method-assign]
    same(train(model, groups, chain), want)
    assert [g.calls for g in graphs] == [[4, 4]]  # the first pass was watched


def test_layers_below_the_lowest_adapter_have_no_way_back():
    groups = [[replace(pad(rows([9, 4, 7], seed=i)), attention_mask=None)] for i in range(4)]
    method = weft.LoRA(rank=3, targets=["layers.1.self_attn.q_proj", "layers.2.mlp.down_proj"])
    want = train(adapted(method=method), groups, None)
    model = adapted(method=method)
    chain = chained(model)
    graphs: list[Again] = []
    capture = chain._captured
    chain._captured = lambda *a: graphs.append(made := capture(*a)) or made  # type: ignore[method-assign]
    same(train(model, groups, chain), want)
    assert [g.calls for g in graphs] == [[3, 3]] and graphs[0].dx is None and not graphs[0].x.requires_grad


def test_packed_rows_of_one_shape_and_gradients_of_several_micro_batches():
    """What bears loss differs from batch to batch, and where rows begin; both stay out of the graph, or come in as numbers."""
    groups = [[filled(pack(rows([9, 4, 7 + i], seed=10 * i + k)), 48, 13) for k in range(3)] for i in range(3)]
    plain = adapted()
    assert attention.use(plain)
    want = train(plain, groups, None)
    model = adapted()
    assert attention.use(model)
    chain = chained(model)
    same(train(model, groups, chain), want)


def test_rows_of_several_adapters():
    """A batch has plans of its own; a graph stays while they say the same, and whose lines are where is in it."""

    def trained(chain_of):
        model = adapted()
        weft.adapt(model, weft.LoRA(rank=2), name="second")
        assert attention.use(model)
        parameters = {f"{name} {key}": p for name in ("default", "second") for key, p in weft.adapters.trainable(model, name).items()}
        flat = Flat(parameters, lambda name: 1.0)
        torch.manual_seed(5)
        flat.data.add_(0.05 * torch.randn_like(flat.data))
        chain, seen, graphs = chain_of(model), [], []
        for i in range(10):
            batches = [filled(pack(rows([9, 4, 7 + i % 3], seed=2 * i + k)), 24, 13) for k in range(2)]
            batch = join(batches, ["default", "second"] if i < 6 else ["second", "default"])
            with routed(model, batch):
                parts = loss_sums(model, batch, [b.n_targets for b in batches])
                torch.stack(parts).sum().backward()
            seen += [part.detach() for part in parts]
            del parts  # a capture wants nothing left of an earlier pass
            graphs.append(0 if chain is None else len(chain.graphs))
            with torch.no_grad():
                flat.data.sub_(0.03 * flat.grad)
            flat.touched()
            flat.zero_grad()
        uninstall(repeated(model))
        return [*seen, flat.data.clone()], graphs

    want, _ = trained(lambda model: None)
    got, graphs = trained(chained)
    same(got, want)
    assert graphs == [0, 1, 1, 1, 1, 1, 0, 1, 1, 1]


def test_shapes_come_and_go():
    lengths = [[9, 4], [5, 3], [9, 4], [12, 4], [5, 3], [9, 4], [8, 1], [7, 1], [6, 1], [8, 1], [7, 1], [6, 1], [6, 1], [9, 4]]
    groups = [[replace(pad(rows(n, seed=i)), attention_mask=None)] for i, n in enumerate(lengths)]
    want = train(adapted(), groups, None)
    model = adapted()
    chain = chained(model)
    kinds: list[int] = []
    ready = chain._ready
    chain._ready = lambda *a: (ready(*a), kinds.append(len(chain.graphs)))[0]  # type: ignore[method-assign]
    same(train(model, groups, chain), want)
    assert kinds == [0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4]  # the fifth kind runs layer by layer


def test_masks_and_kinds_of_layers():
    """Layers of two kinds get two masks and two sets of positions; a padded batch's mask is data."""
    extra = dict(head_dim=8, sliding_window=4)
    groups = [[pad(rows([9, 4, 7] if i % 2 else [7, 9, 2], seed=i))] for i in range(5)]
    want = train(adapted("Gemma3", extra, layers=7), groups, None)
    model = adapted("Gemma3", extra, layers=7)
    chain = chained(model)
    same(train(model, groups, chain), want)
    assert chain.why == "over"


def loss(model, batch):
    value = loss_sum(model, batch)
    value.backward()
    return float(value.detach())


def started(model, batch, passes=2):
    """A chain with one graph."""
    chain = chained(model)
    for _ in range(passes):
        loss(model, batch)
    return chain


BATCH = replace(pad(rows([9, 4, 7])), attention_mask=None)


def test_a_pass_whose_backward_is_still_to_come_is_not_written_over():
    model, other = adapted(), replace(pad(rows([9, 4, 7], seed=5)), attention_mask=None)
    started(model, BATCH)
    parameters = list(weft.adapters.trainable(model, "default").values())
    for p in parameters:
        p.grad.zero_()
    first = loss_sum(model, BATCH)
    second = loss_sum(model, other)
    first.backward()
    got = [p.grad.clone() for p in parameters]
    del second
    uninstall(repeated(model))
    want = torch.autograd.grad(loss_sum(model, BATCH), parameters)
    same(got, list(want))


def test_gradients_come_once():
    model = adapted()
    started(model, BATCH)
    value = loss_sum(model, BATCH)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once a pass"):
        value.backward()


@pytest.mark.parametrize("when", ["from the first pass on", "before the pass", "between"])
def test_gradients_that_are_set_to_none(when):
    model = adapted()
    parameters = list(weft.adapters.trainable(model, "default").values())
    chain = started(model, BATCH, passes=1)
    if when == "from the first pass on":
        for p in parameters:
            p.grad = None
    loss(model, BATCH)
    want = torch.autograd.grad(plainly(model), parameters)
    before = dict(chain.graphs)
    for _ in range(3):
        if when != "between":
            for p in parameters:
                p.grad = None
        value = loss_sum(model, BATCH)
        for p in parameters:
            p.grad = None
        value.backward()
        same([p.grad for p in parameters], list(want))
    assert chain.graphs == before and all(g.calls[1] > 2 for g in before.values())
    parameters[0].grad = torch.ones_like(parameters[0])
    loss(model, BATCH)
    same([parameters[0].grad - 1, parameters[1].grad], [want[0], 2 * want[1]])


@pytest.mark.parametrize("large", [capture_module.LARGE, 0])
def test_whoever_waits_for_gradients_is_called_once_they_are_there(monkeypatch, large):
    """And not within a capture, whose work every replay does again."""
    monkeypatch.setattr(capture_module, "LARGE", large)
    model = adapted()
    parameters = list(weft.adapters.trainable(model, "default").values())
    chain = started(model, BATCH)
    (made,) = chain.graphs.values()
    calls, seen = made.calls[1], []

    def take(i, p):
        seen.append((i, p.grad.clone()))
        p.grad.zero_()

    for i, p in enumerate(parameters):
        p.register_post_accumulate_grad_hook(partial(take, i))
        p.grad.zero_()
    want = torch.autograd.grad(plainly(model), parameters)
    for _ in range(2):
        loss(model, BATCH)
    assert made.calls[1] == calls + 2 and len(seen) == 2 * len(parameters)
    for i, grad in seen:
        same([grad], [want[i]])


def plainly(model):
    regions = [layer._compiled_call_impl for layer in repeated(model)]
    uninstall(repeated(model))
    value = loss_sum(model, BATCH)
    for layer, region in zip(repeated(model), regions, strict=True):
        layer._compiled_call_impl = region
    return value


def test_what_python_decides_makes_new_graphs():
    model = adapted()
    weft.adapt(model, weft.LoRA(rank=2), name="other")
    weft.use(model, "default")
    chain = started(model, BATCH)
    (first,) = chain.graphs.values()
    with torch.no_grad():
        next(iter(weft.adapters.trainable(model, "default").values())).mul_(3.0)
    alone = loss(model, BATCH)
    assert first in chain.graphs.values() and abs(alone - float(plainly(model).detach())) < 1e-4
    with torch.no_grad():
        weft.adapters.attached(model, "other")["model.layers.1.mlp.up_proj"].B.normal_()
    weft.use(model, "other")
    assert abs(loss(model, BATCH) - float(plainly(model).detach())) < 1e-4 and not chain.graphs
    weft.use(model, "default")
    for _ in range(4):
        assert abs(loss(model, BATCH) - alone) < 1e-4
    assert len(chain.graphs) == 1 and first not in chain.graphs.values()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert abs(loss(model, BATCH) - float(plainly(model).detach())) < 1e-4 and not chain.graphs
    for _ in range(6):
        for p in weft.adapters.trainable(model, "default").values():
            p.data = p.data.clone()
        for _ in range(3):
            loss(model, BATCH)
    assert "again and again" in chain.why


def replaced(model):
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(0.5 * layer.weight, requires_grad=False)


def scaled(model):
    model.model.layers[1].mlp.up_proj.plan.scale *= 3


def another(model):
    weft.adapt(model, weft.LoRA(rank=2), name="new")
    weft.use(model, "new")


@pytest.mark.parametrize("change", [replaced, scaled, another])
def test_what_is_put_in_the_place_of_something(change):
    """The graph would go on with what was there, and the next one's gradients are of what is there now."""
    model = adapted()
    chain = started(model, BATCH)
    (first,) = chain.graphs.values()
    change(model)
    loss(model, BATCH)
    assert not chain.graphs
    loss(model, BATCH)
    (second,) = chain.graphs.values()
    name = "new" if change is another else "default"
    trained = {id(p) for p in weft.adapters.trainable(model, name).values()}
    assert second is not first and {id(p) for p, _ in second.sums} == trained


def test_evaluation_and_single_layers_pass_the_chain_by():
    model = adapted()
    chain = started(model, BATCH)
    (made,) = chain.graphs.values()
    calls = list(made.calls)
    with torch.no_grad():
        assert abs(float(loss_sum(model, BATCH)) - float(plainly(model).detach())) < 1e-4
    x = torch.randn(1, 4, 32)
    places = model.model.rotary_emb(x, torch.arange(4)[None])
    assert not model.model.layers[1](x, position_embeddings=places).isnan().any()
    assert made.calls == calls and not chain.why


def test_a_model_that_looks_at_what_lies_between_gets_nan():
    model = adapted()
    started(model, BATCH)
    norm, seen = model.model.layers[1].input_layernorm, []
    layer = model.model.layers[1]
    own = layer._compiled_call_impl
    layer._compiled_call_impl = lambda x, *a, **k: (seen.append(x), own(x, *a, **k))[1]
    loss(model, BATCH)
    assert seen[0].isnan().all() and norm is layer.input_layernorm
    layer._compiled_call_impl = lambda x, *a, **k: x
    with pytest.raises(WeftError, match=r"train\.graphs: false"):
        loss(model, BATCH)


def skipping(model):
    own = model.model.layers[1]._compiled_call_impl
    model.model.layers[1]._compiled_call_impl = lambda x, *a, **k: own(x + 0, *a, **k)


def hooked(model):
    model.model.layers[2].mlp.register_forward_hook(lambda *_: None)


def changed(model):
    model.model.layers[2].mlp.up_proj.plan.A.register_hook(lambda g: None)


@pytest.mark.parametrize(("spoil", "why"), [(skipping, "straight"), (hooked, "hooks"), (changed, "hooks")])
def test_models_that_are_no_chain(spoil, why, caplog):
    model = adapted()
    want = float(plainly(model).detach())
    chain = chained(model)
    spoil(model)
    with caplog.at_level(logging.INFO, "weft"):
        assert all(abs(loss(model, BATCH) - want) < 1e-4 for _ in range(3))
    assert why in chain.why and why in caplog.text and not chain.graphs


def test_an_encoder_and_its_decoder_are_no_chain():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))

        def forward(self, x):
            y = x
            for layer in self.first:
                y = layer(y)
            z = x
            for layer in self.second:
                z = layer(z)
            return y + z

    model, x = Two(), torch.randn(2, 4)
    want = model(x)
    chain = chained(model)
    for _ in range(3):
        assert torch.equal(model(x), want)
    assert "straight" in chain.why


@pytest.mark.parametrize("given", [torch.ones(4, requires_grad=True), nn.Identity(), torch.ones(4).expand(3, 4)])
def test_what_layers_are_given(given):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x, also):
            return x * self.weight + (also["it"] if isinstance(also["it"], Tensor) else 0)

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(2))
    chain = chained(model)
    for _ in range(4):
        x = torch.randn(3, 4)
        y, want = x, x
        for layer in model.layers:
            y, want = layer(y, {"it": given}), layer.forward(want, {"it": given})
        y.sum().backward()
        assert torch.equal(y.detach(), want.detach())
    fits = isinstance(given, Tensor) and not given.requires_grad
    assert bool(chain.graphs) == fits and bool(chain.why) != fits


def test_a_capture_that_fails_is_told_and_not_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(Fake, "problem", RuntimeError("operation not permitted"))
    model = adapted()
    want = float(plainly(model).detach())
    chain = started(model, BATCH)
    assert abs(loss(model, BATCH) - want) < 1e-4
    assert "not permitted" in chain.why and caplog.text.count("not permitted") == 1


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_self_check_sees_what_graphs_give(monkeypatch, spoilt):
    """Compiling is left out here: what stands in for the compiler hands the layer back."""
    monkeypatch.setattr("torch.compile", lambda f, **how: f)
    if spoilt:
        forward = Again.forward
        monkeypatch.setattr(Again, "forward", lambda self: (forward(self), self.out.mul_(1.3))[0])
    model = adapted()
    flat = Flat(weft.adapters.trainable(model, "default"), lambda name: 1.0)
    said: list[str] = []
    fast = prepare(model, BATCH, flat.parameters, compile=True, say=said.append)
    assert fast.captured != spoilt and fast.compiled and ("as CUDA graphs" in fast.describe()) != spoilt
    assert [("not run as CUDA graphs" in s and "does not agree" in s) for s in said] == [True] * spoilt
    assert not flat.grad.any()
    value = fast.loss(BATCH)
    assert abs(float(value.detach()) - float(plainly(model).detach())) < 1e-3
    fast.close()
    assert not any(layer._compiled_call_impl for layer in repeated(model))


@pytest.mark.parametrize(
    ("how", "method", "why"),
    [
        ({"graphs": False}, weft.LoRA(rank=2), ""), ({"graphs": True}, weft.LoRA(rank=2, dropout=0.1), "dropout"),
        ({"graphs": True}, weft.LoHa(rank=2, rank_dropout=0.1), "dropout"), ({"graphs": True}, weft.PrefixTuning(tokens=2), "whole model"),
        ({"memory": 10**9}, weft.LoRA(rank=2), ""), ({"graphs": True, "memory": 0.1}, weft.LoRA(rank=2), None),
    ],
)  # fmt: skip
def test_where_there_are_none(monkeypatch, how, method, why):
    monkeypatch.setattr("torch.compile", lambda f, **how: f)
    said: list[str] = []
    model = adapted(method=method)
    fast = prepare(model, BATCH, weft.adapters.trainable(model, "default"), compile=True, say=said.append, **how)
    assert fast.captured == (why is None)
    assert ([s for s in said if "CUDA graphs" in s] != []) == bool(why) and (why or "") in " ".join(said)
    fast.close()


def test_none_where_several_processes_train(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda f, **how: f)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    said: list[str] = []
    model = adapted()
    fast = prepare(model, BATCH, weft.adapters.trainable(model, "default"), compile=True, graphs=True, say=said.append)
    assert not fast.captured and "several processes" in said[0]
    fast.close()


@pytest.mark.parametrize("large", [capture_module.LARGE, 0])
def test_gradients_of_any_order_are_added(monkeypatch, large):
    """Transposed ones, a scalar's, and none; what is no gradient of theirs stays."""
    monkeypatch.setattr(capture_module, "LARGE", large)
    torch.manual_seed(0)
    x, A, B, s, unused = (torch.randn(shape, requires_grad=True) for shape in ((5, 4), (3, 4), (6, 3), (), (2,)))
    trained = [A, B, s, unused]
    for t in trained:
        t.grad = torch.randn_like(t)
    before = [t.grad.clone() for t in trained]

    def layers():
        return (x @ A.T @ B.T) * s + (A.T @ B.T).sum()

    grad = torch.randn(5, 6)
    want = torch.autograd.grad(layers(), [x, *trained], grad, allow_unused=True)
    dx = add_gradients(layers(), grad, x, trained)
    same([dx, *(t.grad for t in trained)], [want[0], *(b if g is None else b + g for b, g in zip(before, want[1:], strict=True))])
    assert x.grad is None
