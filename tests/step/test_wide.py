"""Down layers of fused MLPs as one product with their adapter: the same loss and gradients, and the model as it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

import weft
from tests.step.test_loss import build, rows
from tests.step.test_stacked import model_of, quiet
from weft.data import pad
from weft.kernels.gated_stacked import gated_stacked, gated_stacked_widened
from weft.kernels.stacked import padded
from weft.kernels.widened import widened, widened_reference
from weft.step import loss_sum, prepare, regions
from weft.step.check import BOUNDS, differences, measure
from weft.step.fp8 import narrowable
from weft.step.inside import Inside

KINDS = [
    ("Qwen2", torch.bfloat16, weft.LoRA(rank=3, alpha=5)), ("Gemma3", torch.float32, weft.LoRA(rank=8, alpha=5)),
    ("Qwen3", torch.float32, weft.DoRA(rank=3)),
]  # fmt: skip


def inside_of(model, narrow=()):
    return Inside.of(model, regions.repeated(model), narrow, kernels=True)


def own_memory(model, weights):
    return all(
        torch.equal(p, weights[name]) and p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes
        for name, p in model.named_parameters() if not p.requires_grad
    )  # fmt: skip


def frozen(model):
    return {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(("shape", "out", "rank"), [((5,), 7, 1), ((2, 3), 19, 8), ((1, 1), 1, 5), ((33,), 4, 65)])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operation_and_its_gradients(shape, out, rank, across, dtype):
    torch.manual_seed(1)
    inside, R = 11, padded(rank)
    H = F.pad(torch.randn(*shape, inside + rank), (0, R - rank)).to(dtype).requires_grad_()
    D = torch.randn(out, rank).to(dtype).requires_grad_()
    W = torch.cat([torch.randn(out, inside).to(dtype), F.pad(D.detach(), (0, R - rank))], 1)
    exact = [t.detach().double().requires_grad_() for t in (H, D)]
    y, want = widened(H, W, D), widened_reference(exact[0], W.double(), exact[1])
    dy = torch.randn(*shape[:-1], out, shape[-1]).to(dtype).mT if across else torch.randn(*shape, out).to(dtype)  # as whatever gives it
    found, right = torch.autograd.grad(y, (H, D), dy), torch.autograd.grad(want, exact, dy.double())
    near = dict(rtol=1.6e-2, atol=1e-5) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    for a, b in zip((y, found[0][..., : inside + rank], found[1]), (want, right[0][..., : inside + rank], right[1]), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        torch.testing.assert_close(a, b.to(dtype), **near)
    flat = H.detach().flatten(0, -2)
    S = flat[:, inside : inside + rank].clone()
    torch.library.opcheck(torch.ops.weft.widened, (flat.requires_grad_(), S, W, D))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("n", "width", "ranks"), [(9, 13, (3, 5, 2)), (1, 1, (1, 1, 1)), (6, 40, (16, 2, 65))])
def test_a_gated_mlp_writes_and_reads_columns(n, width, ranks, gelu):
    torch.manual_seed(n)
    rg, ru, rd = ranks
    Z = torch.randn(n, 2 * width + rg + ru + 4).double().requires_grad_()
    Bg, Bu, A = (torch.randn(s).double().requires_grad_() for s in ((width, rg), (width, ru), (rd, width)))
    leaves = (Z, Bg, Bu, A, torch.rand(width).double().requires_grad_())
    H, (h, S) = (work(*leaves[:4], None, leaves[4], gelu) for work in (gated_stacked_widened, gated_stacked))
    assert H.shape == (n, width + padded(rd)) and not H[:, width + rd :].any()
    assert torch.equal(H[:, :width], h) and torch.equal(H[:, width : width + rd], S)
    for dH in (torch.randn_like(H), torch.randn_like(H.T.contiguous()).T):
        found = torch.autograd.grad(H, leaves, dH, retain_graph=True)
        right = torch.autograd.grad((h, S), leaves, (dH[:, :width], dH[:, width : width + rd]), retain_graph=True)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)
    torch.library.opcheck(torch.ops.weft.gated_stacked_widened, (*leaves[:4], None, leaves[4], gelu))


@quiet
@pytest.mark.parametrize(("kind", "dtype", "method"), KINDS)
def test_compiled(monkeypatch, kind, dtype, method):
    """One graph for all layers; accumulated gradients, with other numbers and another scale; then the model is as it was."""
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)  # here the plain twin stands in for the kernels
    model, parameters = model_of(kind, method, dtype, dict(num_hidden_layers=3) | (dict(head_dim=8) if kind in ("Qwen3", "Gemma3") else {}))
    weights, batches, said = frozen(model), [pad(rows([9, 4, 7])), pad(rows([8, 9], seed=1))], []
    counters.clear()
    fast = prepare(model, batches[0], parameters, compile=True, say=said.append)
    assert not said and len(fast.inside.wides) == 3 and "down of 3 layers one product each" in fast.describe(), said
    assert counters["stats"]["unique_graphs"] == 1  # of all layers
    for change in ("nothing", "numbers", "scale"):
        with torch.no_grad():
            for p in parameters.values():
                p.mul_(1 if change == "nothing" else -1.5)
        if change == "scale":
            for layer in model.model.layers:
                layer.mlp.down_proj.plan.scale *= 1.5
        got = measure(model, batches, fast.loss, parameters)
        want = measure(model, batches, lambda b: loss_sum(model, b, unmasked=True), parameters)  # not within `working`: layer by layer
        assert not (wrong := differences(got, want, BOUNDS["fp32" if dtype == torch.float32 else "16 bit"])[1]), wrong
    with fast.inside.working():
        assert all(wide.on for wide in fast.inside.wides.values())
    fast.close()
    assert own_memory(model, weights) and not any("weft_wide" in vars(m) for m in model.modules())


def test_the_one_product_is_taken(monkeypatch):
    """By what it is called with: the weight's own memory, and the numbers of s·B in its columns."""
    model, _ = model_of(method=weft.LoRA(rank=3, alpha=5))
    inside, given, batch = inside_of(model), [], pad(rows([9, 4]))
    monkeypatch.setattr("weft.step.gated.widened", lambda *a: (given.append(a), widened(*a))[1])
    want = loss_sum(model, batch).item()
    inside.install()
    downs = [layer.mlp.down_proj for layer in model.model.layers]
    for taken in (True, False):
        with inside.working():
            if not taken:
                for wide in inside.wides.values():
                    wide.on = False
            assert abs(loss_sum(model, batch).item() / want - 1) < 1e-5
    assert len(given) == len(downs) == 2
    for (_, W, D), down in zip(given, downs, strict=True):
        width = down.in_features
        assert W.data_ptr() == down.weight.data_ptr() and torch.equal(W[:, :width], down.weight) and down.weight.stride(0) == width + 64
        assert torch.equal(W[:, width : width + 3], 5 / 3 * down.plan.B) and torch.equal(W[:, width : width + 3], D)
        assert not W[:, width + 3 :].any()
    inside.uninstall()


def test_which_are_taken():
    """Plain frozen ones of fused MLPs whose gate and up are stacked in 16 or 32 bits."""
    found = {}
    methods = dict(LoRA=weft.LoRA(rank=2), DoRA=weft.DoRA(rank=2), attention=weft.LoRA(rank=2, targets=["q_proj", "v_proj"]))
    for name, method in methods.items():
        found[name] = len(inside_of(model_of(method=method)[0]).wides)
    for base in ("fp8", "nf4", "int8"):
        model, _ = model_of(base=base)
        found[base] = len(inside_of(model, narrowable(model, everywhere=True).values()).wides)
    model, _ = model_of(extra=dict(mlp_bias=True))  # gate and up are not stacked then
    found["biases"] = len(inside_of(model).wides)
    model, _ = model_of()
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    found["tied"] = len(inside_of(model).wides)
    model, _ = model_of()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    found["trained"] = len(inside_of(model).wides)
    assert found == dict(LoRA=2, DoRA=2, attention=0, fp8=0, nf4=0, int8=0, biases=0, tied=0, trained=1)


def test_one_with_a_bias():
    """That is added after the product."""
    model, _ = model_of()
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(torch.randn(layer.mlp.down_proj.out_features), requires_grad=False)
    batch, inside = pad(rows([9, 4])), inside_of(model)
    want = loss_sum(model, batch).item()
    inside.install()
    with inside.working():
        assert len(inside.wides) == 2 and all(wide.on for wide in inside.wides.values())
        assert abs(loss_sum(model, batch).item() / want - 1) < 1e-5
    inside.uninstall()


def test_dropout_that_begins_later():
    model, _ = model_of(method=weft.LoRA(rank=3, dropout=0.5))
    inside = inside_of(model.eval())
    inside.install()
    for training in (False, True):
        model.train(training)
        with inside.working():
            assert inside.wides and all(wide.on is not training for wide in inside.wides.values())
    inside.uninstall()


def test_a_backward_pass_may_be_owed():
    """The columns are copied before each pass; that brings the same numbers, until somebody steps."""
    model, parameters = model_of()
    inside, batches, found = inside_of(model), [pad(rows([9, 4])), pad(rows([5, 8], seed=1))], []
    for installed in (False, True):
        if installed:
            inside.install()
        losses = []
        for batch in batches:
            with inside.working():
                losses.append(loss_sum(model, batch))
        found.append(torch.autograd.grad(sum(losses), list(parameters.values())))
    inside.uninstall()
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_whatever_else_reads_the_model_meanwhile(tmp_path):
    """Evaluation, another adapter, merging, saving, copying, other memory."""
    model, _ = model_of()
    weft.adapt(model, weft.LoRA(rank=2), name="other")
    weft.use(model, "default")
    ids, batch = torch.randint(97, (2, 12)), pad(rows([9, 4]))
    with torch.no_grad():
        logits = model(ids).logits
    want, state = loss_sum(model, batch).item(), {k: v.clone() for k, v in model.state_dict().items()}
    inside = inside_of(model)
    assert len(inside.wides) == 2

    def on():
        return [wide.on for wide in inside.wides.values()]

    inside.install()
    with inside.working(), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits)
    with inside.working():
        assert on() == [True, True] and abs(loss_sum(model, batch).item() / want - 1) < 1e-5
    with weft.using(model, "other"), inside.working():
        assert on() == [False, False]
    assert all(torch.equal(v, state[k]) and v.is_contiguous() for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = dict(type(model).from_pretrained(tmp_path).named_parameters())
    assert again and all(torch.equal(p, state[name]) for name, p in again.items())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(copied(ids).logits, logits)
    assert abs(loss_sum(copied, batch).item() / want - 1) < 1e-5
    weft.merge(model, "default")
    with torch.no_grad():
        merged = model(ids).logits
    torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-4)
    with inside.working(), torch.no_grad():
        assert on() == [False, False] and torch.equal(model(ids).logits, merged)
    weft.unmerge(model)
    with pytest.raises(ZeroDivisionError), inside.working():
        assert on() == [True, True]
        _ = 1 / 0
    assert on() == [False, False]
    down = model.model.layers[0].mlp.down_proj
    down.weight.data = 2 * down.weight.data  # somebody puts another weight there
    doubled = down.weight.data_ptr()
    with inside.working():
        assert on() == [False, True]
    inside.uninstall()
    assert down.weight.data_ptr() == doubled
    down.weight.data = down.weight.data / 2
    assert own_memory(model, state)


@quiet
@pytest.mark.parametrize("broken", ["wrong", "failing"])
def test_one_that_is_wrong_or_fails_is_left_out(monkeypatch, broken):
    """With the stacking; neither the fused MLPs nor the compiled layers go."""

    def other(*given):
        if broken == "failing":
            raise RuntimeError("no such product")
        return 1.1 * widened(*given)

    monkeypatch.setattr("weft.step.gated.widened", other)
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    model, parameters = model_of()
    weights, said = frozen(model), []
    fast = prepare(model, pad(rows([9, 4, 7])), parameters, compile=True, say=said.append)
    assert len(said) == 1 and "not stacked" in said[0] and ("does not agree" if broken == "wrong" else "no such product") in said[0], said
    assert fast.compiled and len(fast.inside.mlps) == 2 and not fast.inside.wides and "one product" not in fast.describe()
    fast.close()
    assert own_memory(model, weights)


@quiet
def test_recomputed_layers_keep_its_s(monkeypatch):
    """With little memory the MLP's inside is made again where it must be, and S of down is kept as it is thin."""
    model = build("Llama", {"hidden_size": 128, "intermediate_size": 448}).requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=2)).train()
    inside, layers, kept = inside_of(model), regions.repeated(model), []
    inside.install()
    regions.install(layers, True, False, 0, False, 0.02)
    try:
        with inside.working(), torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
            loss = loss_sum(model, pad(rows([90, 100])))
        loss.backward()
    finally:
        regions.uninstall(layers)
        inside.uninstall()
    assert len(layers) == len(inside.wides) == sum(sorted(shape) == [2, 200] for shape in kept) == 2, kept
    assert not any(shape[-1:] in ((448,), (512,)) and shape.numel() >= 200 * 448 for shape in kept)
