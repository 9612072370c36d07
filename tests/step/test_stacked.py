"""Layers of one input as one product: the same loss and gradients, in one graph for all layers, and the model as it was afterwards."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import weft
from tests.step.test_loss import build, rows
from weft.data import pad
from weft.kernels.fp8_gemm import fp8_product, quantise_rows
from weft.kernels.fp8_stacked import fp8_stacked, fp8_stacked_reference
from weft.kernels.gated import gated
from weft.kernels.gated_stacked import gated_stacked
from weft.kernels.stacked import padded, stacked, stacked_reference
from weft.kernels.stacked_added import stacked_added, stacked_added_reference
from weft.quant import FORMATS, quantise_
from weft.step import gated as gated_module
from weft.step import loss_sum, prepare
from weft.step.check import BOUNDS, differences, measure
from weft.step.fp8 import narrowable
from weft.step.gated import gated_mlps
from weft.step.stackable import stacks
from weft.step.stacked import STACK, install, uninstall, working

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute")  # what torch's compiler itself causes
BEHIND = dict(q_proj=8, k_proj=3, v_proj=16, gate_proj=5, up_proj=8)  # ranks that are no multiples of 8, alone nor together


def model_of(kind="Llama", method=None, dtype=torch.float32, extra=None, base=None):
    model = build(kind, extra or {}).requires_grad_(False).to(dtype)
    if base is not None:
        quantise_(model, base)
    weft.adapt(model, method or weft.LoRA(rank=3, alpha=5, rank_pattern=BEHIND)).train()
    parameters = weft.adapters.trainable(model, "default")
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.05 * torch.randn_like(p))
    return model, parameters


SHAPES = [((5,), (7,), (1,)), ((2, 3), (4, 9, 6), (3, 8, 2)), ((1, 1), (4, 9), (0, 5)), ((2, 3), (11, 1), (70, 3)), ((0,), (4,), (2,))]


@pytest.mark.parametrize(("shape", "outs", "ranks"), SHAPES)
def test_the_operation_and_its_gradients(shape, outs, ranks):
    torch.manual_seed(0)
    inside, R = 11, padded(sum(ranks))
    x, A = torch.randn(*shape, inside).double().requires_grad_(), [torch.randn(r, inside, requires_grad=True) for r in ranks if r]
    W = torch.randn(sum(outs) + R, inside).double()
    W[sum(outs) :] = torch.cat([*(a.detach() for a in A), torch.zeros(R - sum(ranks), inside)])  # the A's are of another type
    Z, want = stacked(x, W, A), stacked_reference(x, W, A)
    torch.testing.assert_close(Z, want, rtol=1e-5, atol=1e-5)
    dZ = torch.randn_like(Z)
    for a, b in zip(*(torch.autograd.grad(z, [x, *A], dZ) for z in (Z, want)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "outs", "ranks"), SHAPES)
def test_the_operation_that_adds_the_updates(shape, outs, ranks):
    torch.manual_seed(0)
    inside, R, N = 11, padded(sum(ranks)), sum(outs)
    x, A = torch.randn(*shape, inside).double().requires_grad_(), torch.randn(R, inside).double().requires_grad_()
    D, W = torch.randn(N, R).double().requires_grad_(), torch.full((N + R, inside + R), torch.nan).double()
    W[:N, :inside] = torch.randn(N, inside)
    before = W[:N, :inside].clone()
    Z, want = stacked_added(x, W, A, D), stacked_added_reference(x, W, A, D)
    torch.testing.assert_close(Z, want)
    dZ = torch.cat((torch.randn(*shape, N), torch.full((*shape, R), torch.nan)), -1).double()  # S's own gradient is not looked at
    given = dZ.clone()
    (found,) = (torch.autograd.grad(Z, (x, A, D), dZ, retain_graph=True),)
    for a, b in zip(found, torch.autograd.grad(want[..., :N], (x, A, D), dZ[..., :N]), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(W[:N, :inside], before) and given.isnan().equal(dZ.isnan()) and torch.equal(given[..., :N], dZ[..., :N])


@pytest.mark.parametrize(("shape", "outs", "ranks"), [((5,), (16,), (1,)), ((2, 3), (32, 16, 48), (3, 8, 2)), ((33,), (16, 16), (0, 5))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [True, False])
def test_the_operation_in_fp8_and_its_gradients(shape, outs, ranks, dtype, added):
    torch.manual_seed(2)
    inside, R = 48, padded(sum(ranks))
    held = [FORMATS["fp8"].pack(torch.randn(out, inside) * 10.0 ** (i - 1)) for i, out in enumerate(outs)]  # of unlike sizes
    W, scale = (torch.cat([h[key].view(t) for h in held]).view(u) for key, t, u in
                (("weight", torch.uint8, torch.float8_e4m3fn), ("scale", torch.float32, torch.float32)))  # fmt: skip
    x, D = torch.randn(*shape, inside, dtype=dtype, requires_grad=True), torch.randn(sum(outs), R).to(dtype)
    D[:, sum(ranks) :] = 0
    D.requires_grad_()
    A = [torch.randn(r, inside).to(dtype).float().requires_grad_() for r in ranks if r]
    rows = torch.cat([*(a.detach().to(dtype) for a in A), torch.zeros(R - sum(ranks), inside, dtype=dtype)])
    given = [D] if added else []
    Z, want = fp8_stacked(x, W, scale, rows, A, *given), fp8_stacked_reference(x, W, scale, A, *given)
    dZ = torch.randn_like(Z)
    if added:
        dZ[..., sum(outs) :] = 0  # then S is nobody else's
    leaves, before, near = [x, *A, *given], dZ.clone(), 1e-5 if dtype == torch.float32 else 1e-2
    assert (Z - want).norm() <= near * want.norm() and Z.dtype == want.dtype
    for a, b in zip(*(torch.autograd.grad(z, leaves, dZ) for z in (Z, want)), strict=True):
        assert a.dtype == b.dtype and (a - b)[..., : sum(ranks)].norm() <= near * b[..., : sum(ranks)].norm()
    assert torch.equal(dZ, before)
    plain = x.float() @ torch.cat([FORMATS["fp8"].unpack(h, (out, inside), torch.float32) for h, out in zip(held, outs, strict=True)]).T
    if not added:  # each layer's own part is as near as by itself, whatever the sizes of the others
        for y, exact in zip(Z.float().split([*outs, R], -1), plain.split(outs, -1), strict=False):
            assert (y - exact).norm() <= 0.06 * exact.norm()


def test_a_product_in_fp8_into_columns():
    q, scale = quantise_rows(torch.randn(5, 32))
    w, w_scale = quantise_rows(torch.randn(16, 32))
    wide = torch.full((5, 24), torch.nan)
    y = fp8_product(q, scale, w, w_scale.T, torch.float32, out=wide[:, :16])
    assert torch.equal(y, fp8_product(q, scale, w, w_scale.T, torch.float32)) and torch.equal(y, wide[:, :16])
    assert wide.isnan().sum() == 5 * 8


@pytest.mark.parametrize("gelu", [False, True])
def test_a_gated_mlp_reads_and_writes_columns(gelu):
    torch.manual_seed(1)
    n, width, (rg, ru, rd), rest = 9, 13, (3, 5, 2), 4
    Z = torch.randn(n, 2 * width + rg + ru + rest).double().requires_grad_()
    Bg, Bu, A = (torch.randn(s).double().requires_grad_() for s in ((width, rg), (width, ru), (rd, width)))
    cg = torch.rand(width).double().requires_grad_()
    g, u, Sg, Su, _ = Z.split((width, width, rg, ru, rest), 1)
    want, found = gated(g, u, Sg, Bg, Su, Bu, A, cg, None, gelu), gated_stacked(Z, Bg, Bu, A, cg, None, gelu)
    given = [torch.randn_like(t) for t in want]
    for a, b in zip((*found, *torch.autograd.grad(found, (Z, Bg, Bu, A, cg), given)),
                    (*want, *torch.autograd.grad(want, (Z, Bg, Bu, A, cg), given)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@quiet
@pytest.mark.parametrize(("kind", "dtype", "fused", "method"), [
    ("Llama", torch.float32, False, None), ("Qwen2", torch.bfloat16, False, None), ("Gemma3", torch.bfloat16, True, None),
    ("Qwen3", torch.float32, True, weft.DoRA(rank=3)), ("Llama", torch.float32, False, weft.LoRA(rank=3, targets=["q_proj", "v_proj"])),
])  # fmt: skip
def test_compiled(monkeypatch, kind, dtype, fused, method):
    """One graph for all layers; accumulated gradients, twice, the second time with other adapters' numbers; then the model is as it was."""
    monkeypatch.setattr("weft.step.fast.usable", lambda t: fused)  # here the plain twin stands in for the kernels
    model, parameters = model_of(kind, method, dtype, dict(num_hidden_layers=3) | (dict(head_dim=8) if kind in ("Qwen3", "Gemma3") else {}))
    weights = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    batches, said = [pad(rows([9, 4, 7])), pad(rows([8, 9], seed=1))], []
    counters.clear()
    fast = prepare(model, batches[0], parameters, compile=True, say=said.append)
    partly = method is not None and method.targets == ("q_proj", "v_proj")
    assert not said and fast.compiled and len(fast.inside.mlps) == 3 * fused, said
    assert len(fast.inside.stacks) == (3 if partly else 6) and "q, k, v of 3 layers" in fast.describe() and "self-check" in fast.said[0]
    assert Counter(fast.inside.lone.values()) == ({} if partly else {"o_proj": 3} | ({} if fused else {"down_proj": 3}))
    assert counters["stats"]["unique_graphs"] == 1  # of all layers
    for _ in range(2):
        got = measure(model, batches, fast.loss, parameters)
        want = measure(model, batches, lambda b: loss_sum(model, b, unmasked=True), parameters)  # not within `working`: layer by layer
        assert not (wrong := differences(got, want, BOUNDS["fp32" if dtype == torch.float32 else "16 bit"])[1]), wrong
        with torch.no_grad():
            for p in parameters.values():
                p.mul_(-1.5)
    assert counters["stats"]["unique_graphs"] == 2  # and of layers by themselves; the other batch's shape needs none
    fast.close()
    assert not any({"forward", STACK} & vars(m).keys() for m in model.modules())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, weights[name]) and p.untyped_storage().nbytes() == p.nbytes, name


@quiet
@pytest.mark.parametrize(("kind", "dtype", "fused", "method"), [
    ("Llama", torch.float32, False, None), ("Qwen2", torch.bfloat16, True, None), ("Llama", torch.float32, True, weft.DoRA(rank=3)),
])  # fmt: skip
def test_compiled_in_fp8(monkeypatch, kind, dtype, fused, method):
    """Against products in fp8 layer by layer, which round elsewhere only in the backward pass; then the packed bytes are as they were."""
    monkeypatch.setattr("weft.step.fast.usable", lambda t: fused)
    monkeypatch.setattr("weft.step.fast.narrowable", partial(narrowable, everywhere=True))
    model, parameters = model_of(kind, method, dtype, dict(num_hidden_layers=3), base="fp8")
    before = {name: t.clone() for name, t in model.state_dict().items() if "weight" in name}
    batches, said = [pad(rows([9, 4, 7])), pad(rows([8, 9], seed=1))], []
    counters.clear()
    fast = prepare(model, batches[0], parameters, compile=True, say=said.append)
    assert not said and len(fast.inside.stacks) == 6 and len(fast.narrow) == 21 and len(fast.inside.mlps) == 3 * fused, said
    assert all(stack.fp8 for stack in fast.inside.stacks.values()) and "21 products in fp8" in fast.describe()
    assert counters["stats"]["unique_graphs"] == 1
    for _ in range(2):
        got = measure(model, batches, fast.loss, parameters)
        want = measure(model, batches, lambda b: loss_sum(model, b, unmasked=True), parameters)  # not within `working`: layer by layer
        limits = (2e-3, 0.05, 0.2) if dtype == torch.float32 else BOUNDS["16 bit"]
        assert not (wrong := differences(got, want, limits)[1]), wrong
        with torch.no_grad():
            for p in parameters.values():
                p.mul_(-1.5)
    fast.close()
    for name, t in model.state_dict().items():
        if name in before:
            assert torch.equal(t, before[name]) and t.untyped_storage().nbytes() == t.nbytes, name


@quiet
def test_a_layer_too_far_off_leaves_its_group_alone(monkeypatch):
    monkeypatch.setattr("weft.step.fast.usable", lambda t: False)
    monkeypatch.setattr("weft.step.fast.narrowable", partial(narrowable, everywhere=True))
    model, parameters = model_of(base="fp8")
    bad = model.model.layers[1].self_attn.k_proj
    bad.in_fp8 = lambda x: 1.2 * type(bad).in_fp8(bad, x)
    said = []
    fast = prepare(model, pad(rows([9, 4, 7])), parameters, compile=True, say=said.append)
    assert len(said) == 1 and "1 of 14 layers are too far off" in said[0] and "layers.1.self_attn.k_proj" in said[0], said
    assert model.model.layers[1].self_attn not in fast.inside.stacks and len(fast.inside.stacks) == 3 and len(fast.narrow) == 13
    assert "q, k, v of 1 layers and gate, up of 2 layers stacked" in fast.describe()
    fast.close()
    assert not stacks(model, {}) and len(stacks(model, {}, narrowable(model, everywhere=True).values())) == 4


def test_which_are_taken():
    method, found = weft.LoRA(rank=2), {}
    extras = {"Mixtral": dict(num_local_experts=4), "GPT2": dict(n_embd=32, n_layer=2, n_head=4)}
    for kind, extra in ({"Llama": {}, "Qwen2": {}} | extras).items():
        model = build(kind, extra).requires_grad_(False)
        weft.adapt(model, method)
        found[kind] = [stack.names[0] for stack in stacks(model, {}).values()]
    both = ["q_proj", "gate_proj"] * 2
    assert found == {"Llama": both, "Qwen2": both, "Mixtral": ["q_proj"] * 2, "GPT2": []}
    others = {"wide": weft.LoRA(rank=65), "lora_bias": weft.LoRA(rank=2, lora_bias=True), "dropout": weft.LoRA(rank=2, dropout=0.1)}
    others |= {"elsewhere": weft.LoRA(rank=2, targets=["o_proj"]), "LoKr": weft.LoKr(rank=2)}
    for name, other in others.items():
        model, _ = model_of(method=other)
        assert not stacks(model, {}), name
    model = build("Llama", {}).requires_grad_(False)
    weft.quant.quantise_(model, "nf4")
    assert not stacks(weft.adapt(model, method), {})
    model, _ = model_of(extra=dict(mlp_bias=True))
    assert len(stacks(model, {})) == 4 and len(stacks(model, [layer.mlp for layer in model.model.layers])) == 2


@pytest.mark.parametrize("touch", ["hook", "forward", "trained", "tied", "another input"])
def test_what_is_unlike_the_others_is_left_alone(touch):
    model, _ = model_of()
    layers = model.model.layers
    attention = layers[1].self_attn
    assert attention in stacks(model, {})
    if touch == "hook":
        attention.k_proj.register_forward_hook(lambda *_: None)
    elif touch == "forward":
        attention.forward = attention.forward
    elif touch == "trained":
        attention.k_proj.weight.requires_grad_()
    elif touch == "tied":
        attention.k_proj.weight = attention.v_proj.weight
    else:
        class Apart(type(attention)):
            def forward(self, hidden_states, *args, **kwargs):
                keys, own = self.k_proj, dict(self._modules)
                self._modules["k_proj"] = nn.Sequential(nn.Identity())
                self._modules["k_proj"].forward = lambda x: keys(x + 0)
                try:
                    return super().forward(hidden_states, *args, **kwargs)
                finally:
                    self._modules = own

        attention.__class__ = Apart
    found = stacks(model, {})
    assert attention not in found and layers[0].self_attn in found and layers[1].mlp in found


def test_dropout_that_begins_later():
    """On an evaluating model there is none to see yet."""
    model, _ = model_of(method=weft.LoRA(rank=3, dropout=0.5))
    found = stacks(model.eval(), {})
    install(found, {})
    with working(found):
        assert found and all(stack.on for stack in found.values())
    model.train()
    with working(found):
        assert not any(stack.on for stack in found.values())
    uninstall(found)


def test_a_module_has_a_stack_of_its_own():
    model, _ = model_of()
    for layer in model.model.layers:
        layer.self_attn.stack = layer.mlp.stack = 3
    batch = pad(rows([9, 4]))
    want, found, mlps = loss_sum(model, batch).item(), stacks(model, {}), gated_mlps(model)
    gated_module.install(mlps)
    assert abs(loss_sum(model, batch).item() / want - 1) < 1e-5
    install(found, mlps)
    with working(found):
        assert abs(loss_sum(model, batch).item() / want - 1) < 1e-5
    uninstall(found)
    gated_module.uninstall(mlps)
    assert all(layer.self_attn.stack == layer.mlp.stack == 3 for layer in model.model.layers)


@quiet
def test_layers_that_the_model_computes_again():
    """In the backward pass, around the region, as transformers' own did before 5.23."""
    model, parameters = model_of()

    class Outside(type(model.model.layers[0])):
        def __call__(self, *args, **kwargs):
            return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=False)

    for layer in model.model.layers:
        layer.__class__ = Outside
        layer.gradient_checkpointing = True
    model.eval()  # so that the newest ones stay out of it
    said: list[str] = []
    fast = prepare(model, pad(rows([9, 4, 7])), parameters, compile=True, say=said.append)
    fast.close()
    assert fast.compiled and not said, said


@pytest.mark.parametrize("base", [None, "fp8"])
def test_whatever_else_reads_the_model_meanwhile(tmp_path, base):
    """Evaluation to the last bit, another adapter, merging, saving, copying."""
    model, _ = model_of(base=base)
    narrow = narrowable(model, everywhere=True).values()
    for layer in narrow:
        layer.narrow = True
    weft.adapt(model, weft.LoRA(rank=2), name="other")
    weft.use(model, "default")
    ids, batch = torch.randint(97, (2, 12)), pad(rows([9, 4]))
    with torch.no_grad():
        logits = model(ids).logits
    want, state = loss_sum(model, batch).item(), {k: v.clone() for k, v in model.state_dict().items()}
    found = stacks(model, {}, narrow)
    install(found, {})
    assert len(found) == 4
    with working(found), torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    with working(found):
        assert all(stack.on for stack in found.values())
        assert abs(loss_sum(model, batch).item() / want - 1) < 1e-5
    with weft.using(model, "other"), working(found):
        assert not any(stack.on for stack in found.values())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if base is None:  # transformers writes no packed weights
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        own = dict(again.named_parameters())
        assert own and all(torch.equal(p, state[name]) for name, p in own.items())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, logits)
    weft.merge(model, "default")
    with torch.no_grad():
        merged = model(ids).logits
    torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-4)
    with working(found), torch.no_grad():
        assert not any(stack.on for stack in found.values()) and torch.equal(model(ids).logits, merged)
    weft.unmerge(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    with pytest.raises(ZeroDivisionError), working(found):
        _ = 1 / 0
    assert not any(stack.on for stack in found.values())
    uninstall(found)
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name]) and p.untyped_storage().nbytes() == p.nbytes, name


@quiet
@pytest.mark.parametrize(("broken", "why"), [("wrong", "does not agree"), ("failing", "no such product"), ("large", "does not fit")])
def test_stacking_goes_first(monkeypatch, broken, why):
    """One that is wrong, fails or has no room costs the stacking, and neither the fused MLPs nor the compiled layers."""
    import weft.step.stacked as module

    def other(*given):
        if broken == "failing":
            raise RuntimeError("no such product")
        return 1.1 * stacked_added(*given)

    gathered, gather = [], module.Stack._gather

    def few(stack, *given):
        gathered.append(stack)
        if len(gathered) > 2:
            raise torch.OutOfMemoryError
        return gather(stack, *given)

    monkeypatch.setattr(*(module.Stack, "_gather", few) if broken == "large" else (module, "stacked_added", other))
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    model, parameters = model_of()
    weights, said = {name: p.clone() for name, p in model.named_parameters()}, []
    fast = prepare(model, pad(rows([9, 4, 7])), parameters, compile=True, say=said.append)
    assert len(said) == 1 and "not stacked" in said[0] and why in said[0], said
    assert fast.compiled and len(fast.inside.mlps) == 2 and not fast.inside.stacks and "stacked" not in fast.describe()
    fast.close()
    assert all(torch.equal(p, weights[name]) and p.untyped_storage().nbytes() == p.nbytes for name, p in model.named_parameters())
    assert gated_mlps(model)
