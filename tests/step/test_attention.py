"""The two twins agree with attention written out, and without packing the seam is transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.step.test_loss import MODELS, build
from weft.models import attention
from weft.models.layout import layout, layout_of

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: FlashAttention has no CPU form")


def written_out(q, k, v, lengths, window):
    """Row by row, key by key: q (T, H, D), k and v (T, Hkv, D)."""
    groups, out, start = q.shape[1] // k.shape[1], [], 0
    for n in lengths:
        a, b, c = (x[start : start + n].transpose(0, 1) for x in (q, k, v))
        scores = a @ b.repeat_interleave(groups, 0).transpose(1, 2) * 0.3
        back = torch.arange(n)[:, None] - torch.arange(n)[None]
        seen = (back >= 0) & (back < (window or n))
        out.append((scores.masked_fill(~seen.to(q.device), -torch.inf).softmax(-1) @ c.repeat_interleave(groups, 0)).transpose(0, 1))
        start += n
    return torch.cat(out)


def qkv(lengths, heads, groups, size, seed=0, dtype=torch.float64, device="cpu"):
    torch.manual_seed(seed)
    total = sum(lengths)
    shapes = [(total, heads, size), (total, heads // groups, size), (total, heads // groups, size)]
    return [torch.randn(shape, dtype=dtype).to(device).requires_grad_() for shape in shapes]


def starts(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=9), st.sampled_from([(4, 1), (4, 2), (4, 4)]), st.sampled_from([None, 1, 3, 50]))
def test_padded_is_exact(lengths, heads, window):
    q, k, v = qkv(lengths, *heads, size=6)
    got = attention.padded(q, k, v, starts(lengths), 0.3, window)
    want = written_out(q, k, v, lengths, window)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def own_places(lengths, prefix):
    """Where rows' own tokens stand behind `prefix` places each."""
    return torch.cat([torch.arange(n) + sum(lengths[:i]) + prefix * (i + 1) for i, n in enumerate(lengths)])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=9), st.integers(1, 7), st.sampled_from([None, 1, 3, 50]))
def test_padded_with_a_prefix_before_the_keys_is_exact(lengths, prefix, window):
    longer = [n + prefix for n in lengths]
    q, k, v = qkv(longer, 4, 2, size=6)
    own = own_places(lengths, prefix)
    got = attention.padded(q[own], k, v, starts(lengths), 0.3, window, cu_keys=starts(longer))
    want = written_out(q, k, v, longer, window)[own]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_of_gradients():
    lengths = [3, 1, 5]
    cu = starts(lengths)
    plan = layout(lengths)
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(attention._Collect.apply(attention._Spread.apply(x, plan.place, plan.size), plan.place, plan.size), x)
    assert torch.autograd.gradcheck(lambda x: attention._Spread.apply(x, plan.place, plan.size), x)
    assert torch.autograd.gradgradcheck(lambda x: attention._Spread.apply(x, plan.place, plan.size).square(), x)
    assert layout_of(cu) is layout_of(cu)


def test_blocks_hold_rows_of_like_length_and_little_padding():
    torch.manual_seed(0)
    lengths = torch.randint(1, 500, (80,)).tolist()
    plan = layout(lengths)
    assert plan.size < 1.3 * sum(lengths) and len(plan.blocks) < 20
    assert plan.place.unique().numel() == sum(lengths) and int(plan.place.max()) < plan.size


@cuda
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_is_the_twin_of_padded(window, groups, dtype):
    lengths = [37, 1, 128, 65, 3]
    q, k, v = qkv(lengths, 8, groups, 64, dtype=dtype, device="cuda")
    assert attention.can_varlen(q, v, 0.0) and not attention.can_varlen(q, v, 0.1)
    cu = starts(lengths, "cuda")
    got = attention.varlen(q, k, v, cu, max(lengths), 0.3, window)
    want = attention.padded(q.float(), k.float(), v.float(), cu, 0.3, window)
    assert float((got.float() - want).detach().norm()) < 1e-2 * float(want.detach().norm())
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((x.float() * weight).sum(), (q, k, v)) for x in (got, want)), strict=True):
        assert float((a.float() - b.float()).norm()) < 1e-2 * float(b.float().norm())


@cuda
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_with_a_prefix_is_the_twin_of_padded(window):
    lengths, prefix = [37, 1, 128, 65, 3], 6
    longer = [n + prefix for n in lengths]
    q, k, v = qkv(longer, 8, 4, 64, dtype=torch.bfloat16, device="cuda")
    q, cu, cu_keys = q[own_places(lengths, prefix).cuda()], starts(lengths, "cuda"), starts(longer, "cuda")
    got = attention.varlen(q, k, v, cu, max(lengths), 0.3, window, cu_keys, max(longer))
    want = attention.padded(q.float(), k.float(), v.float(), cu, 0.3, window, cu_keys=cu_keys)
    assert float((got.float() - want).detach().norm()) < 1e-2 * float(want.detach().norm())


@cuda
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_models_on_cuda_are_packed_in_16_bits(name):
    model = build(*MODELS[name]).cuda().bfloat16()
    assert attention.use(model), attention.reason(model)


@pytest.mark.parametrize("name", MODELS)
def test_without_packing_it_is_transformers_own(name):
    """Left- and right-padded batches, and generation with a cache: bit for bit."""
    own, ours = build(*MODELS[name]), build(*MODELS[name])
    assert attention.use(ours), attention.reason(ours)
    ids = torch.arange(3, 3 + 2 * 9).view(2, 9)
    for mask in (None, torch.tensor([[0] * 3 + [1] * 6, [1] * 9]), torch.tensor([[1] * 6 + [0] * 3, [1] * 9])):
        with torch.no_grad():
            assert torch.equal(ours(ids, attention_mask=mask).logits, own(ids, attention_mask=mask).logits)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    make = dict(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    a, b = (model.generate(ids, attention_mask=mask, **make) for model in (ours, own))
    assert torch.equal(a.sequences, b.sequences) and all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def test_restarting_positions_alone_still_keep_rows_apart():
    """transformers' own reading of position_ids, when nobody passes row boundaries."""
    model = build("Llama", {})
    assert attention.use(model)
    ids = torch.arange(3, 12)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        got = model(ids, position_ids=positions, use_cache=False).logits
        cu = starts([4, 5])
        ours = model(ids, position_ids=positions, use_cache=False, **attention.packed_kwargs(cu)).logits
        keywords = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=5, max_length_k=5)
        plain = model(ids, position_ids=positions, use_cache=False, **keywords).logits
    torch.testing.assert_close(got, ours, rtol=1e-5, atol=1e-5)
    assert torch.equal(plain, ours)


def test_no_mask_is_built(monkeypatch):
    """A packed call of 4096 tokens allocates nothing near T * T."""
    model = build("Llama", dict(max_position_embeddings=4096, num_hidden_layers=1))
    assert attention.use(model)
    lengths = [64] * 64
    cu = starts(lengths)
    ids, positions = torch.zeros(1, 4096, dtype=torch.int64), torch.arange(64).repeat(64)[None]
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        model(ids, position_ids=positions, use_cache=False, **attention.packed_kwargs(cu, lengths))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 4096 * 32 * 4 <= largest < 4096 * 4096  # bytes: the hidden states are seen, a mask is not


def test_packing_does_not_go_with_a_cache():
    model = build("Llama", {})
    assert attention.use(model)
    cache = model(torch.arange(3, 8)[None], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a packed batch does not go together with a cache"):
        model(torch.arange(3, 8)[None], past_key_values=cache, **attention.packed_kwargs(starts([2, 3])))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "gemma3-window"])
def test_rows_without_padding_need_no_mask(name):
    """The placeholder stands for a causal mask, with a layer's window if it has one."""
    model = build(*MODELS[name]).double()
    ids = torch.randint(3, 97, (3, 11))
    want = model(ids, use_cache=False).logits
    assert attention.use(model)
    made = []
    real = attention._sdpa_mask
    attention._sdpa_mask = lambda *a, **k: made.append(a) or real(*a, **k)
    try:
        got = model(ids, attention_mask=attention.placeholder(ids.device), use_cache=False).logits
    finally:
        attention._sdpa_mask = real
    assert not made
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
