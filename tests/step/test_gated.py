"""The fused inside of gated MLPs: the operation against plain products, and whole models with it against themselves without."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import weft
from tests.step.test_loss import build, rows
from weft.data import pad
from weft.kernels.gated import gated, gated_reference
from weft.kernels.gated_stacked import gated_stacked
from weft.step import gated as step_gated
from weft.step import loss_sum, prepare


@pytest.mark.parametrize(("n", "width", "ranks", "scaled", "gelu"), [
    (1, 3, (1, 1, 1), (False, False), False), (9, 11, (2, 3, 4), (True, True), True), (40, 17, (16, 1, 5), (False, True), False),
])  # fmt: skip
def test_the_operation_and_its_gradients(n, width, ranks, scaled, gelu):
    torch.manual_seed(n)
    rg, ru, rd = ranks
    shapes = [(n, width), (n, width), (n, rg), (width, rg), (n, ru), (width, ru), (rd, width)]
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    c = [torch.randn(width, dtype=torch.float64, requires_grad=True) if there else None for there in scaled]
    g, u, Sg, Bg, Su, Bu, A = given
    gate, up = ((y + S @ B.T) * (1 if k is None else k) for y, S, B, k in ((g, Sg, Bg, c[0]), (u, Su, Bu, c[1])))
    want = (torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)) * up
    h, S = gated(*given, *c, gelu=gelu)
    torch.testing.assert_close(h, want)
    torch.testing.assert_close(S, want @ A.T)
    dh, dS = torch.randn_like(h), torch.randn_like(S)
    leaves = [t for t in (*given, *c) if t is not None]
    got = torch.autograd.grad((h * dh).sum() + (S * dS).sum(), leaves)
    expected = torch.autograd.grad((want * dh).sum() + ((want @ A.T) * dS).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_rounded_once():
    torch.manual_seed(0)
    given = [torch.randn(s, dtype=torch.bfloat16) for s in ((33, 20), (33, 20), (33, 4), (20, 4), (33, 4), (20, 4), (3, 20))]
    exact, _ = gated_reference(*(t.double() for t in given))
    h, S = gated_reference(*given)
    assert torch.equal(h, exact.to(torch.bfloat16))
    torch.testing.assert_close(S, (h.double() @ given[6].double().T).to(torch.bfloat16))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux only")
def test_the_triton_kernels_equal_plain_torch():
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, script], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "277 equal", done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_at_all(shape):
    """As an expert has that nobody is sent to."""
    g, u, Sg, Su = (torch.randn(*shape, n, requires_grad=True) for n in (6, 6, 2, 3))
    Bg, Bu, A = (torch.randn(s, requires_grad=True) for s in ((6, 2), (6, 3), (4, 6)))
    Z = torch.randn(*shape, 2 * 6 + 64, requires_grad=True)
    for leaves, (h, S) in (((g, u, Sg, Bg, Su, Bu, A), gated(g, u, Sg, Bg, Su, Bu, A)), ((Z, Bg, Bu, A), gated_stacked(Z, Bg, Bu, A))):
        assert h.shape == (*shape, 6) and S.shape == (*shape, 4)
        grads = torch.autograd.grad(h.sum() + S.sum(), leaves)
        assert all(d.shape == t.shape and not d.any() for d, t in zip(grads, leaves, strict=True))


def test_which_mlps_are_taken():
    """Those that compute the formula, with LoRA or DoRA on all three maps."""
    taken = {}
    methods = {"LoRA": weft.LoRA(rank=2), "DoRA": weft.DoRA(rank=2), "attention": weft.LoRA(rank=2, targets=["q_proj", "v_proj"])}
    methods |= {"wide": weft.LoRA(rank=65), "biased": weft.LoRA(rank=2, lora_bias=True), "dropout": weft.LoRA(rank=2, dropout=0.1)}
    for kind in ("Llama", "Gemma", "Nemotron"):  # the last computes something else
        for name, method in methods.items():
            model = build(kind, {}).requires_grad_(False)
            weft.adapt(model, method).train()
            taken[kind, name] = len(step_gated.gated_mlps(model))
    assert [taken.pop((kind, name)) for kind in ("Llama", "Gemma") for name in ("LoRA", "DoRA")] == [2] * 4
    assert not any(taken.values()), taken


@pytest.mark.parametrize("touch", ["hook", "backward hook", "forward", "adapter"])
def test_what_somebody_touched_is_left_alone(touch):
    model = build("Llama", {}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=2), name="maps")
    weft.adapt(model, weft.Bottleneck(reduction=8, targets=["mlp"]), name="around")  # starts as the identity
    weft.use(model, "maps")
    mlp = model.model.layers[1].mlp
    assert list(step_gated.gated_mlps(model)) == [model.model.layers[0].mlp, mlp]
    if touch == "hook":
        mlp.up_proj.register_forward_hook(lambda *_: None)
    elif touch == "backward hook":
        mlp.register_full_backward_hook(lambda *_: None)
    elif touch == "forward":
        mlp.gate_proj.forward = mlp.gate_proj.forward
    else:
        weft.use(model, ["maps", "around"])
    assert list(step_gated.gated_mlps(model)) == ([] if touch == "adapter" else [model.model.layers[0].mlp])


def test_evaluation_is_the_models_own():
    """To the last bit, and with the norms that DoRA keeps between tokens."""
    model = build("Llama", {}).requires_grad_(False)
    weft.adapt(model, weft.DoRA(rank=2)).train()
    with torch.no_grad():
        for p in weft.adapters.trainable(model, "default").values():
            p.add_(0.1 * torch.randn_like(p))
    ids, mlps, found = torch.randint(97, (4, 40)), step_gated.gated_mlps(model), []
    for _ in range(2):
        with torch.no_grad():
            found.append(model(ids).logits)
        step_gated.install(mlps)
    training = model(ids).logits
    step_gated.uninstall(mlps)
    assert len(mlps) == 2 and torch.equal(*found)
    torch.testing.assert_close(training, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_a_model_computes_the_same_with_it_and_another_adapter_is_respected(kind):
    model = build(kind, {}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=3), name="one")
    weft.adapt(model, weft.DoRA(rank=3), name="other")
    weft.adapt(model, weft.LoKr(rank=2), name="third")
    batch = pad(rows([9, 4, 7]))
    names = ("one", "other", "third")
    for name in names:
        weft.use(model, name)
        parameters = list(weft.adapters.trainable(model, name).values())
        with torch.no_grad():
            for p in parameters:
                p.add_(0.05 * torch.randn_like(p))
    weft.use(model, "one")
    parameters = {n: list(weft.adapters.trainable(model, n).values()) for n in names}
    mlps = step_gated.gated_mlps(model)
    assert len(mlps) == 2
    want, got = {}, {}
    for found in (want, got):
        for name in names:
            weft.use(model, name)
            loss = loss_sum(model, batch)
            found[name] = (loss.detach(), *torch.autograd.grad(loss, parameters[name]))
        step_gated.install(mlps)
    step_gated.uninstall(mlps)
    assert not any("forward" in vars(m) for m in mlps)
    for name in want:
        for a, b in zip(got[name], want[name], strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")  # what torch's compiler itself causes
@pytest.mark.parametrize(("memory", "base", "method"), [(1.0, None, weft.DoRA), (0.1, "nf4", weft.LoRA)])
def test_compiled(monkeypatch, memory, base, method):
    """The step takes it where Triton can be used; here its plain twin stands in for the kernels."""
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    model = build("Llama", {}).requires_grad_(False)
    if base:
        weft.quant.quantise_(model, base)
    weft.adapt(model, method(rank=3)).train()
    said: list[str] = []
    parameters = weft.adapters.trainable(model, "default")
    fast = prepare(model, pad(rows([9, 4, 7])), parameters, compile=True, memory=memory, say=said.append)
    fast.close()
    assert not said and fast.compiled and len(fast.inside.mlps) == 2 and "2 gated MLPs fused" in fast.describe(), said
    assert "self-check" in fast.said[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")
def test_a_wrong_one_is_found(monkeypatch):
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    for place in ("gated", "gated_stacked"):
        monkeypatch.setattr(f"weft.kernels.{place}.gated_reference", lambda *a: [1.1 * t for t in gated_reference(*a)])
    model = build("Llama", {}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=3)).train()
    said: list[str] = []
    fast = prepare(model, pad(rows([9, 4, 7])), weft.adapters.trainable(model, "default"), compile=True, say=said.append)
    fast.close()
    assert len(said) == 2 and "not stacked" in said[0]
    assert "not fused" in said[1] and "does not agree" in said[1] and "layers.0" in said[1]
    assert fast.compiled and not fast.inside.mlps and "self-check" in fast.said[0]  # the rest of the fast step stays


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")
def test_one_that_fails_is_left_out(monkeypatch):
    def broken(*tensors):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    for place in ("gated", "gated_stacked"):
        monkeypatch.setattr(f"weft.kernels.{place}.gated_reference", broken)
    model = build("Llama", {}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=3)).train()
    said: list[str] = []
    fast = prepare(model, pad(rows([9, 4, 7])), weft.adapters.trainable(model, "default"), compile=True, say=said.append)
    fast.close()
    assert len(said) == 2 and "not stacked" in said[0] and "no such kernel" in said[1] and fast.compiled and not fast.inside.mlps


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")
def test_recomputed_layers_keep_what_is_thin(monkeypatch):
    """With little memory the layers' own products are made again, but neither x Aᵀ nor the fused operation that S comes from."""
    import weft.step.regions as regions

    model = build("Llama", {"hidden_size": 128, "intermediate_size": 448}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=2)).train()
    calls, kept = [], []
    monkeypatch.setattr("weft.kernels.gated.gated_reference", lambda *a: (calls.append(1), gated_reference(*a))[1])
    mlps, layers = step_gated.gated_mlps(model), regions.repeated(model)
    step_gated.install(mlps)
    regions.install(layers, True, False, 0, False, 0.02)
    batch = pad(rows([90, 100]))
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
            loss = loss_sum(model, batch)
        loss.backward()
    finally:
        regions.uninstall(layers)
        step_gated.uninstall(mlps)
    assert len(calls) == len(layers) == 2
    assert sum(shape[-1:] == (2,) and shape.numel() == 400 for shape in kept) == 7 * len(layers)
    assert not any(shape[-1:] == (448,) and shape.numel() >= 200 * 448 for shape in kept)


def test_one_of_which_a_process_has_a_part_is_left_alone():
    """FSDP2 makes it whole only within its layer's own forward."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = build("Llama", {}).requires_grad_(False)
        weft.adapt(model, weft.LoRA(rank=2))
        assert len(step_gated.gated_mlps(model)) == 2
        fully_shard(model.model.layers[0], mesh=init_device_mesh("cpu", (1,)))
        assert list(step_gated.gated_mlps(model)) == [model.model.layers[1].mlp]
    finally:
        dist.destroy_process_group()
