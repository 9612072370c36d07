"""The fast path of a step against the plain one: loss and gradients, with every layer compiled, recomputed, or neither."""

from __future__ import annotations

import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import weft
from tests.step.test_loss import build, rows
from weft import data
from weft.core import WeftError, modules
from weft.data import Row, pack, pad
from weft.data.batches import filled
from weft.kernels.fp8_gemm import fp8_linear
from weft.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from weft.models import attention
from weft.quant import FORMATS, quantise_
from weft.step import loss_sum, prepare
from weft.step.check import pieces
from weft.step.fp8 import narrowable
from weft.step.loss import fusible
from weft.step.regions import install, repeated, uninstall


@pytest.mark.parametrize(("n", "d", "V", "rows", "bias"), [(1, 3, 5, 1, False), (37, 16, 97, 10, True), (128, 33, 1001, 128, False)])
def test_linear_cross_entropy(n, d, V, rows, bias):
    torch.manual_seed(n)
    h, W = torch.randn(n, d, dtype=torch.float64, requires_grad=True), torch.randn(V, d, dtype=torch.float64)
    b = torch.randn(V, dtype=torch.float64) if bias else None
    targets = torch.randint(0, V, (n,))
    targets[1::3] = -100
    want = linear_cross_entropy_reference(h, W, targets, b)
    (g,) = torch.autograd.grad(want, h)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        x = h.detach().to(dtype).requires_grad_()
        got = linear_cross_entropy(x, W.to(dtype), targets, None if b is None else b.to(dtype), rows)
        (3 * got).backward()
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        assert abs(got.item() - want.item()) <= tolerance * want.item()
        assert (x.grad.double() / 3 - g).norm() <= tolerance * g.norm()


def test_a_head_that_is_trained_gets_its_gradient():
    h, W = torch.randn(9, 4), torch.randn(7, 4, requires_grad=True)
    linear_cross_entropy(h, W, torch.arange(9) % 7).backward()
    assert W.grad is not None


@pytest.mark.parametrize(("tokens", "inside", "outside"), [(1, 16, 32), (33, 48, 16), (130, 256, 80)])
def test_fp8_linear(tokens, inside, outside):
    """Against plain products; 3 bits of mantissa on both sides leave about 4% of the result's size."""
    torch.manual_seed(tokens)
    W, x = torch.randn(outside, inside), torch.randn(2, tokens, inside, requires_grad=True)
    held = FORMATS["fp8"].pack(W)
    y = fp8_linear(x, held["weight"], held["scale"])
    want = x @ W.T
    assert (y - want).norm() <= 0.06 * want.norm()
    g = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, g)
    assert (got - g @ W).norm() <= 0.06 * (g @ W).norm()


def test_heads_that_can_be_fused():
    assert fusible(build("Llama", {}).requires_grad_(False)) is not None
    capped = build("Gemma2", dict(head_dim=8, sliding_window=4, final_logit_softcapping=5.0))
    assert fusible(capped.requires_grad_(False)) is None
    model = build("Llama", dict(tie_word_embeddings=False)).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=2, targets=["lm_head", "q_proj"]))
    assert fusible(model) is None


def test_repeated_layers():
    assert len(repeated(build("Llama", {}))) == 2
    assert len(repeated(build("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)))) == 2
    assert len(repeated(build("Mixtral", dict(num_local_experts=4)))) == 2
    assert repeated(nn.Linear(3, 3)) == []


@pytest.mark.parametrize(("kind", "extra"), [("Llama", {}), ("Mixtral", dict(num_local_experts=4)), ("Qwen2", {})])
@pytest.mark.parametrize("memory", [1.0, 0.5, 0.0])
def test_recomputed_layers_and_fused_loss(kind, extra, memory):
    model = build(kind, extra).requires_grad_(False).train()
    weft.adapt(model, weft.LoRA(rank=3)).train()
    batch = pad(rows([9, 4, 7]))
    if attention.use(model):
        batch = pack(rows([9, 4, 7]))
    check(model, batch, memory=memory, compile=False)


def check(model, batch, **how):
    parameters = weft.adapters.trainable(model, "default")
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.05 * torch.randn_like(p))
    want = torch.autograd.grad(loss_sum(model, batch), list(parameters.values()), allow_unused=True)
    said = []
    fast = prepare(model, batch, parameters, say=said.append, **how)
    try:
        assert not said and fast.said and fast.head is not None, said
        got = torch.autograd.grad(fast.loss(batch), list(parameters.values()), allow_unused=True)
    finally:
        fast.close()
    for name, a, b in zip(parameters, got, want, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).norm() <= 1e-3 * max(b.norm(), 1e-3), name
    return fast


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")  # what torch's compiler itself causes
@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_compiled_layers(memory):
    model = build("Llama", {}).requires_grad_(False)
    assert attention.use(model)
    weft.adapt(model, weft.LoRA(rank=3)).train()
    batch = pad(rows([9, 4, 7])) if memory else pack(rows([9, 4, 7]))
    assert check(model, batch, compile=True, memory=memory).compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # the newest transformers call it by another name
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_the_checkpoints_of_transformers(monkeypatch, reentrant):
    """A layer's region lies within them, fused MLP and all."""
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    model = build("Llama", {}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=3)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    said: list[str] = []
    fast = prepare(model, pad(rows([9, 4, 7])), weft.adapters.trainable(model, "default"), compile=True, say=said.append)
    fast.close()
    assert not said and fast.compiled and len(fast.inside.mlps) == 2 and "self-check" in fast.said[0], said


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")
def test_rounding_in_16_bits_is_no_disagreement():
    """By inductor, whose fused operations round elsewhere; many short rows with one template, as in the demo."""
    model = weft.load_base("embedded", base="bf16", device="cpu").requires_grad_(False)
    attention.use(model)
    torch.manual_seed(0)
    weft.adapt(model, weft.LoRA(rank=16)).train()
    words = ["".join(random.Random(i).choices("abcde", k=3 + i % 7)) for i in range(60)]
    told = [Row("", "", ({"role": "user", "content": f"Upper: {w}"}, {"role": "assistant", "content": w.upper()})) for w in words]
    batch = pack(data.prepare(told, weft.load_tokenizer("embedded"), data.DataConfig(train="")).examples)
    said: list[str] = []
    fast = prepare(model, batch, weft.adapters.trainable(model, "default"), compile=True, varying=False, say=said.append)
    fast.close()
    assert fast.compiled and not said, said


@pytest.mark.parametrize("varying", [False, True])
def test_floats_are_constants_of_a_compiled_layer(monkeypatch, varying):
    """Where shapes vary torch makes them inputs of the graph, on the CPU: on a card it would build C++ for them. Without a mask no other
    number is among them either."""
    model = build("Llama", {}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=3, alpha=5)).train()
    batch, graphs = pad(rows([9, 4, 7])), []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr("weft.step.regions.inductor", aot_autograd(fw_compiler=keep, bw_compiler=keep))
    layers = repeated(model)
    install(layers, True, varying, 0, False, 1.0)
    try:
        loss_sum(model, batch, unmasked=True).backward()
    finally:
        uninstall(layers)
    values = [node.meta.get("val") for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 2 and any(isinstance(v, torch.Tensor) for v in values)  # forward and backward, one pair for both layers
    assert not [v for v in values if isinstance(v, torch.SymFloat) or (isinstance(v, torch.Tensor) and v.dim() == 0)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compilers_settings_are_the_users_again():
    model = build("Llama", {})
    layers = repeated(model)

    def settings():
        kept = ("activation_memory_budget", "activation_memory_budget_runtime_estimator", "is_non_builtin_to_include")
        graphs = torch._functorch.config.autograd_cache_allow_custom_autograd_functions
        return [getattr(torch._functorch.config, k) for k in kept] + [graphs, dynamo.specialize_float, dynamo.recompile_limit]

    dynamo = torch._dynamo.config
    with torch._functorch.config.patch(activation_memory_budget=0.7), dynamo.patch(recompile_limit=11):
        before = settings()
        install(layers, True, False, 0, False, 0.5)
        install(layers, True, False, 0, False, 0.3)  # again, with nothing between
        assert settings()[0] == 0.3
        uninstall(layers)
        assert settings() == before and 0.7 in before and 11 in before
        uninstall(layers)
        assert settings() == before


def test_a_trial_that_fails_leaves_the_model_as_it_was(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    model = build("Llama", {}).requires_grad_(False)
    quantise_(model, "fp8")
    weft.adapt(model, weft.LoRA(rank=3)).train()
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    monkeypatch.setattr("weft.step.fast.narrowable", partial(narrowable, everywhere=True))
    monkeypatch.setattr("weft.step.trial.measure", full)
    said = []
    with pytest.raises(weft.WeftError, match="does not fit"):
        prepare(model, pad(rows([9, 4])), weft.adapters.trainable(model, "default"), compile=True, fp8=True, say=said.append)
    assert "self-check was left out" in said[0] and "trying less" in said[1]
    left = [m for m in model.modules() if m._compiled_call_impl is not None or "forward" in vars(m) or getattr(m, "narrow", False)]
    assert not left and model.training


@pytest.mark.parametrize("fp8", [None, True])
def test_products_in_fp8_that_nothing_was_held_against(monkeypatch, fp8):
    """They are for those who asked."""
    model = build("Llama", {}).requires_grad_(False)
    quantise_(model, "fp8")
    weft.adapt(model, weft.LoRA(rank=3)).train()
    monkeypatch.setattr("weft.step.fast.narrowable", partial(narrowable, everywhere=True))
    monkeypatch.setattr("weft.step.trial.plain_pass", lambda *_: None)
    fast = prepare(model, pad(rows([9, 4])), weft.adapters.trainable(model, "default"), compile=False, fp8=fp8)
    assert sum(m.narrow for _, m in modules(model) if hasattr(m, "narrow")) == len(fast.narrow) == (14 if fp8 else 0)
    fast.close()


def test_warming_up_is_silent_when_the_process_ends_meanwhile():
    script = "import atexit; from weft.step import warm; atexit.register(warm().join)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_fast_path_that_is_wrong_is_named_and_not_used(monkeypatch):
    model = build("Llama", {}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=3)).train()
    monkeypatch.setattr("weft.step.loss.linear_cross_entropy", lambda h, W, t, b: linear_cross_entropy(1.1 * h, W, t, b))
    said = []
    fast = prepare(model, pad(rows([9, 4])), weft.adapters.trainable(model, "default"), compile=False, say=said.append)
    assert fast.head is None and "does not agree" in said[0] and "layers.0" in said[0]


def test_a_compiler_that_is_wrong_costs_no_more_than_compiling(monkeypatch):
    model = build("Llama", {}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=3)).train()
    monkeypatch.setattr("torch.compile", lambda f, **how: lambda *a, **k: 1.5 * f(*a, **k))
    said: list[str] = []
    fast = prepare(model, pad(rows([9, 4])), weft.adapters.trainable(model, "default"), compile=True, say=said.append)
    fast.close()
    assert len(said) == 2 and "not stacked" in said[0]
    assert "not compiled" in said[1] and "does not agree" in said[1] and "layers.0" in said[1]
    assert not fast.compiled and fast.head is not None and fast.unmasked and "self-check" in fast.said[0]


def test_pieces_add_up():
    model = build("Llama", {}).requires_grad_(False)
    examples = rows([9, 4, 7, 12, 3])
    assert attention.use(model)
    for batch in (pad(examples), pack(examples), filled(pack(examples), 48, 13)):
        parts = pieces(batch, 14)
        assert len(parts) > 1
        whole = loss_sum(model, batch)
        assert abs(sum(loss_sum(model, b) for b in parts) - whole) <= 1e-5 * whole


def test_a_filled_batch_is_of_one_shape_and_loss():
    model = build("Llama", {}).requires_grad_(False)
    assert attention.use(model)
    shapes = set()
    for lengths in ([9, 4, 7], [12, 12, 3], [1, 1, 1, 12]):
        batch = pack(rows(lengths))
        full = filled(batch, 40, 12)
        shapes.add((full.input_ids.shape, full.position_ids.shape, full.cu_seqlens.shape))
        assert full.n_targets == batch.n_targets and full.cu_seqlens[-1] == 40
        a, b = loss_sum(model, batch), loss_sum(model, full)
        assert abs(a - b) <= 1e-5 * a
    assert len({s[0] for s in shapes}) == 1 and len(shapes) <= 2


@pytest.mark.parametrize("method", ["LoRA", "ALoRA", "PrefixTuning", "PromptTuning", "PTuning"])
def test_filling_a_batch_changes_no_gradient(method):
    model = build("Llama", {}).requires_grad_(False)
    assert attention.use(model)
    extra = {"rank": 2, "invocation_tokens": (5,)} if method == "ALoRA" else {"rank": 2} if method == "LoRA" else {"tokens": 3}
    weft.adapt(model, getattr(weft, method)(**extra)).train()
    parameters = list(weft.adapters.trainable(model, "default").values())
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn_like(p))
    batch = pack(rows([9, 4, 7]))
    full = filled(batch, 40, 9)
    assert full.lengths == (9, 4, 7, 9, 9, 2, 0, 0)
    want, got = (torch.autograd.grad(loss_sum(model, b), parameters, allow_unused=True) for b in (batch, full))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.parametrize("spoilt", [False, True])
def test_products_in_fp8(monkeypatch, spoilt):
    """By their twin here. A layer whose products come out too far off is named and decodes."""
    model = build("Llama", {}).requires_grad_(False)
    quantise_(model, "fp8")
    weft.adapt(model, weft.LoRA(rank=3)).train()
    monkeypatch.setattr("weft.step.fast.narrowable", partial(narrowable, everywhere=True))
    if spoilt:  # as a layer beyond the range of fp8 would
        up = dict(modules(model))["model.layers.1.mlp.up_proj"]
        monkeypatch.setattr(up, "in_fp8", lambda x: type(up).in_fp8(up, 1.3 * x))
    said = []
    fast = prepare(model, pad(rows([9, 4, 7])), weft.adapters.trainable(model, "default"), compile=False, fp8=True, say=said.append)
    assert len(fast.narrow) == 14 - spoilt
    assert bool(said) == spoilt and all("1 of 14 layers" in s and "layers.1.mlp.up_proj" in s for s in said)
    assert any("self-check (fp8)" in s for s in fast.said)
    assert sum(m.narrow for m in fast.narrow.values()) == len(fast.narrow)
    fast.close()
    assert not any(m.narrow for _, m in modules(model) if hasattr(m, "narrow"))


def test_a_layer_that_the_checked_batch_never_reaches_is_not_taken(monkeypatch):
    model = build("Llama", {}).requires_grad_(False)
    model.tower = nn.Sequential(nn.Linear(16, 16))  # as the eyes of a model that is given text alone
    quantise_(model, "fp8")
    weft.adapt(model, weft.LoRA(rank=3, targets=["q_proj"])).train()
    monkeypatch.setattr("weft.step.fast.narrowable", partial(narrowable, everywhere=True))
    fast = prepare(model, pad(rows([9, 4])), weft.adapters.trainable(model, "default"), compile=False, fp8=True)
    assert len(fast.narrow) == 14 and not any("tower" in path for path in fast.narrow)
    fast.close()


def test_memory_of_no_sense():
    with pytest.raises(WeftError, match=r"train\.memory"):
        prepare(nn.Linear(2, 2), pad(rows([3])), {}, memory="much")
