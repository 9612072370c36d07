"""A layer that is compiled ahead, from a copy: its graph is the one that all layers then use, and nothing is left of the copy."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import ref

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from tests.step.test_loss import rows
from weft.data import pack, pad
from weft.models import attention
from weft.step import fast as steps
from weft.step import prepare, trial
from weft.step.fast import Fast
from weft.step.twin import Ahead

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)


def build(method: type[Any] = weft.LoRA) -> Any:
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **SIZES)).requires_grad_(False)
    return weft.adapt(model, method(rank=4)).train()


# Fake tensors of a thread leave, where torch finds no card, a pointer to something of that thread: this one lives as long as the process.
WORKER = ThreadPoolExecutor(1)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """On a CPU it is tried too; whether there was a graph, each time."""
    told: list[bool] = []
    begin, end = trial.compile_ahead, Ahead.end

    def trying(fast: Fast, *rest: Any) -> Any:
        fast.cuda = True
        try:
            return begin(fast, *rest)
        finally:
            fast.cuda = False

    def telling(self: Ahead) -> bool:
        told.append(end(self))
        return told[-1]

    monkeypatch.setattr(steps, "usable", lambda t: True)
    monkeypatch.setattr(trial, "compile_ahead", trying)
    monkeypatch.setattr(Ahead, "end", telling)
    work: list[Future[None]] = []
    monkeypatch.setattr(Ahead, "start", lambda self: work.append(WORKER.submit(self.run)))
    monkeypatch.setattr(Ahead, "join", lambda self: [w.result() for w in work])
    counters.clear()
    return told


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("method", [weft.LoRA, weft.DoRA])
def test_its_graphs_are_the_layers_both_ways(ended: list[bool], monkeypatch: pytest.MonkeyPatch, method: type[Any], varying: bool) -> None:
    model = build(method)
    parameters = weft.adapters.trainable(model, "default")
    places = {name: p.data_ptr() for name, p in parameters.items()}
    graphs: list[int] = []
    plain = trial.plain_pass
    end = Ahead.end

    def ending(self: Ahead) -> bool:
        made = end(self)
        graphs.append(counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"])
        return made

    def after(fast: Fast, *rest: Any) -> Any:
        assert not any(p.grad is not None and p.grad.any() for p in parameters.values())
        return plain(fast, *rest)

    monkeypatch.setattr(Ahead, "end", ending)
    monkeypatch.setattr(trial, "plain_pass", after)
    fast = prepare(model, pad(rows([9, 4, 7])), parameters, compile=True, varying=varying, say=pytest.fail)
    assert ended == [True] and graphs == [2] and fast.compiled and fast.inside.stacks and fast.inside.mlps
    fast.loss(pad(rows([9, 5, 8]))).backward()
    assert counters["frames"]["total"] == 1 and counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == 2
    fast.close()
    assert places == {name: p.data_ptr() for name, p in parameters.items()}


def test_packed_rows(ended: list[bool]) -> None:
    model = build()
    assert attention.use(model)
    fast = prepare(model, pack(rows([9, 4, 7])), weft.adapters.trainable(model, "default"), compile=True, say=pytest.fail)
    assert ended == [True] and fast.compiled and "self-check" in fast.said[0]
    fast.close()


def test_settings_are_those_of_the_level(ended: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch keeps them for each thread by itself."""
    seen: list[float] = []
    from torch._functorch import config, partitioners

    work = partitioners.min_cut_rematerialization_partition
    monkeypatch.setattr(
        "torch._inductor.compile_fx.min_cut_rematerialization_partition",
        lambda *a, **k: seen.append(config.activation_memory_budget) or work(*a, **k),
    )
    model = build()
    parameters = weft.adapters.trainable(model, "default")
    with config.patch(enable_autograd_cache=False):  # a graph from there has been cut already
        fast = prepare(model, pad(rows([9, 4])), parameters, compile=True, memory=0.3, varying=False, say=pytest.fail)
    fast.close()
    assert seen == [0.3] and ended == [True] and config.activation_memory_budget == 1.0


def test_no_graph_is_chosen_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one nor any later one, and not what others compile."""
    seen: list[bool] = []
    from torch._functorch import config as aot
    from torch._functorch import partitioners
    from torch._inductor import config

    work = partitioners.min_cut_rematerialization_partition
    monkeypatch.setattr(
        "torch._inductor.compile_fx.min_cut_rematerialization_partition", lambda *a, **k: seen.append(config.deterministic) or work(*a, **k)
    )
    model = build()
    with aot.patch(enable_autograd_cache=False):
        fast = prepare(model, pad(rows([9, 4])), weft.adapters.trainable(model, "default"), compile=True, varying=False, say=pytest.fail)
        fast.loss(pad(rows([7, 7]))).backward()
    assert seen == [True, True] and not config.deterministic
    fast.close()


@pytest.mark.parametrize("wrong", ["copy", "compiler"])
def test_without_it_layers_are_compiled_as_ever(ended: list[bool], monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    model = build()
    if wrong == "copy":
        model.model.layers[0].mlp.odd = torch.ones(2, requires_grad=True) * 2  # torch copies no such tensor
    else:
        monkeypatch.setattr(Ahead, "_compile", lambda self: None)
    fast = prepare(model, pad(rows([9, 4])), weft.adapters.trainable(model, "default"), compile=True, say=pytest.fail)
    assert ended == ([] if wrong == "copy" else [False]) and fast.compiled
    fast.close()


def test_a_plain_pass_that_the_compiler_breaks_is_done_again_alone(ended, monkeypatch):
    """torch's tracing puts its own in the place of nn.Module.__call__, for all threads: seen once on a card."""
    tried: list[int] = []
    held: list[ref[torch.Tensor]] = []
    plain = trial.plain_pass

    def broken(fast: Fast, batch: Any, parameters: Any, say: Any, keep: bool = True) -> Any:
        tried.append(1)
        if len(tried) == 1:
            next(iter(parameters.values())).grad = torch.ones_like(next(iter(parameters.values())))  # what a pass leaves that broke off
            large = torch.ones(3)  # as activations are, which the pass that is done again needs the room of
            held.append(ref(large))
            raise NameError("module is not installed as a submodule")
        assert held[0]() is None
        return plain(fast, batch, parameters, say, keep)

    monkeypatch.setattr(trial, "plain_pass", broken)
    model, batch = build(), pad(rows([9, 9]))
    said: list[str] = []
    fast = prepare(model, batch, weft.adapters.trainable(model, "default"), compile=True, varying=False, say=said.append)
    assert len(tried) == 2 and ended == [True] and fast.compiled and not said
    fast.close()


def test_a_plain_pass_that_fails_alone_fails(monkeypatch):
    def broken(*_: Any) -> Any:
        raise NameError("no such thing")

    monkeypatch.setattr(trial, "plain_pass", broken)
    model, batch = build(), pad(rows([9, 9]))
    with pytest.raises(NameError, match="no such thing"):
        prepare(model, batch, weft.adapters.trainable(model, "default"), compile=False, varying=False)
