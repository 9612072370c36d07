"""Padded rows without their attention mask: the same loss and gradients where `unmaskable` says so, and a mask where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import weft
from tests.conftest import Plain
from tests.step.test_loss import MODELS, REFUSED, SMALL, build, close, gradients, rows
from weft.data import pack, pad
from weft.models import attention
from weft.step import loss_sum, loss_sums, prepare
from weft.step.loss import unmaskable

FAMILIES = (
    MODELS
    | {name: kind[:2] for name, kind in REFUSED.items()}
    | {
        "qwen3-moe": ("Qwen3Moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)),
        "opt": ("OPT", dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),  # numbers its places by the mask
        "bloom": ("Bloom", dict(n_layer=2, n_head=4)),  # and so does this one, in its biases
    }
)


class Seen(nn.Module):
    """A model of its own: tokens see all that the mask lets them, and where `causal`, nothing to their right."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 16), nn.Linear(16, 97)
        self.causal, self.calls = causal, 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        x = self.embed(input_ids)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scores = (x @ x.mT / 16).masked_fill(seen[:, None] == 0, -1e9)
        if self.causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -1e9)
        return self.head(x + scores.softmax(-1) @ x)


def bidirectional(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "own":
        return Seen()
    if name == "bart":
        config = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                      encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=97, dropout=0.0)  # fmt: skip
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**config))
    if name == "gemma3":
        return build("Gemma3", dict(head_dim=8, sliding_window=4, use_bidirectional_attention=True))
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL | dict(num_key_value_heads=4)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_causal_model_needs_no_mask(name):
    model = build(*FAMILIES[name])
    batch = pad(rows([9, 4, 31, 2, 17], seed=3))
    assert unmaskable(model, batch)
    want, got = loss_sum(model, batch), loss_sum(model, batch, unmasked=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    close(gradients(model, got), gradients(model, want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_types(dtype):
    assert unmaskable(build("Llama", {}).to(dtype), pad(rows([9, 4])))
    assert not unmaskable(bidirectional("own").to(dtype), pad(rows([9, 4])))


@pytest.mark.parametrize("name", ["own", "bart", "gemma3", "bert"])
def test_one_that_looks_right_keeps_it(name, caplog):
    caplog.set_level("INFO", logger="weft")
    model = bidirectional(name)
    assert not unmaskable(model, pad(rows([9, 4])))
    assert "without it" in caplog.text


def test_padding_before_the_tokens_keeps_it(caplog):
    caplog.set_level("INFO", logger="weft")
    model, batch = build("Llama", {}), pad(rows([9, 4]))
    left = replace(batch, **{n: getattr(batch, n).flip(1) for n in ("input_ids", "targets", "attention_mask")})
    assert not unmaskable(model, left) and "padding before" in caplog.text


def test_the_trial_costs_nothing_without_a_mask_and_leaves_no_trace():
    model = Seen(causal=True).train()
    model.head.eval()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert not unmaskable(model, pack(rows([9, 4]))) and model.calls == 0
    assert unmaskable(model, pad(rows([9, 4]))) and model.calls == 3
    assert unmaskable(model, pad(rows([2])))  # rows that are shorter than the trial's, and fewer
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not unmaskable(Plain(), pad(rows([9, 4])))  # takes none


METHODS = {
    "LoRA": dict(rank=2), "ALoRA": dict(rank=2, invocation_tokens=(5,)), "PrefixTuning": dict(tokens=3), "PromptTuning": dict(tokens=3),
    "PTuning": dict(tokens=3),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gemma3-window"])
@pytest.mark.parametrize("seam", [False, True])
def test_methods(method, kind, seam):
    model = build(*MODELS[kind]).requires_grad_(False)
    assert not seam or attention.use(model)
    weft.adapt(model, getattr(weft, method)(**METHODS[method])).train()
    parameters = weft.adapters.trainable(model, "default")
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn_like(p))
    batch = pad(rows([9, 4, 31, 2, 17], seed=3))
    batch.input_ids[:4, 1] = 5
    want = gradients(model, loss_sum(model, batch))
    said: list[str] = []
    fast = prepare(model, batch, parameters, compile=False, say=said.append)
    assert fast.unmasked and not said and fast.said and "padding not masked" in fast.describe()
    close(gradients(model, fast.loss(batch)), want, 1e-4)
    fast.close()


def test_rows_of_several_adapters_with_fronts_of_their_own():
    model = build("Llama", {}).requires_grad_(False)
    for name, method in {"a": weft.PromptTuning(tokens=3), "b": weft.LoRA(rank=2), "c": weft.PromptTuning(tokens=5)}.items():
        weft.adapt(model, method, name=name)
    for name in "abc":
        for p in weft.adapters.trainable(model, name).values():
            p.requires_grad_(True)
    batch = pad(rows([9, 4, 31, 2, 17], seed=3))
    with weft.rows(model, ["a", "a", "b", "c", None]):
        assert unmaskable(model, batch)
        want, got = (loss_sums(model, batch, (2, 1, 1, 1), unmasked=u) for u in (False, True))
        torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-5, atol=0)
        close(*(gradients(model, torch.stack(sums).sum()) for sums in (got, want)), 1e-4)


def test_a_mask_that_was_needed_after_all_comes_back(monkeypatch):
    """As where the trial's short rows did not show it: the self-check does."""
    monkeypatch.setattr("weft.step.fast.unmaskable", lambda *_: True)
    model = bidirectional("own")
    batch = pad(rows([9, 4, 17]))
    want = loss_sum(model, batch)
    said: list[str] = []
    fast = prepare(model, batch, dict(model.named_parameters()), compile=False, say=said.append)
    assert "does not agree" in said[0] and not fast.unmasked and "not masked" not in fast.describe()
    assert torch.equal(fast.loss(batch), want)
