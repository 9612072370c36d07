"""The loss of a packed batch is that of its rows alone, on every kind of model, and so are its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from weft.core import WeftError
from weft.data import Example, pack, pad
from weft.models import attention
from weft.step import loss_sum
from weft.step.loss import accepts

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
WINDOW = ["full_attention", "sliding_attention"]
MODELS = {  # name -> (class, config); all of these can be packed
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=WINDOW)),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "mistral-window": ("Mistral", dict(sliding_window=4)),
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gemma3-window": ("Gemma3", dict(head_dim=8, sliding_window=4)),
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
}
REFUSED = {  # why they keep their own attention
    "gemma2": ("Gemma2", dict(head_dim=8, sliding_window=4), ("'eager', not 'sdpa'", "softcap")),  # transformers 5.17 runs it with sdpa
    "gpt-oss": ("GptOss", dict(head_dim=8, num_local_experts=4, rope_scaling=None), "'eager', not 'sdpa'"),  # sinks
    "mamba": ("Mamba", {}, "'eager', not 'sdpa'"),
    "falcon": ("Falcon", {}, "does not use transformers' attention interface"),
    "lfm2": ("Lfm2", dict(layer_types=["conv", "full_attention"]), "packed rows come out differently"),
}


def build(kind: str, extra: dict, seed: int = 0) -> nn.Module:
    config_class = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model_class = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    common = {k: v for k, v in SMALL.items() if kind != "GPT2" or k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(seed)
    model = model_class(config_class(**common | extra)).eval()
    with torch.no_grad():  # weights as initialised hardly attend: make attention matter
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in name and "wpe" not in name and "wte" not in name:
                p.mul_(6)
    return model


def rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    made = [Example(rng.integers(3, 97, n).astype(np.int32), rng.random(n) < 0.4, i) for i, n in enumerate(lengths)]
    for row in made:
        row.bears[0] = False
        row.bears[-1] = True
    return made


def alone(model: nn.Module, row: Example) -> torch.Tensor:
    """The loss of one row, written out: no batch, no mask, nothing of ours."""
    ids = torch.from_numpy(row.ids.astype(np.int64))[None]
    logits = model(ids).logits[0, :-1]
    bears = torch.from_numpy(row.bears[1:])
    return F.cross_entropy(logits[bears], ids[0, 1:][bears], reduction="sum")


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def close(a, b, tolerance=2e-5):
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            assert x is None and y is None
        else:
            assert float((x - y).abs().max()) <= tolerance * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_rows_alone(name):
    model = build(*MODELS[name])
    batch_rows = rows([2, 31, 7, 3, 30, 1 + 1, 17, 29, 12, 5], seed=5)
    want = sum(alone(model, row) for row in batch_rows)
    want_gradients = gradients(model, want)
    assert attention.use(model), attention.reason(model)
    packed, padded = pack(batch_rows), pad(batch_rows)
    assert packed.n_targets == padded.n_targets
    for batch in (packed, padded):
        loss = loss_sum(model, batch)
        assert loss.dtype == torch.float32 and loss.shape == ()
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        close(gradients(model, loss), want_gradients)


def test_a_model_that_numbers_tokens_by_their_mask():
    model = build("OPT", dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0))
    assert attention.use(model), attention.reason(model)
    for lengths in ([9, 9, 9], [9, 4, 7]):
        batch_rows = rows(lengths)
        for batch in (pad(batch_rows), pack(batch_rows)):
            want = sum(alone(model, row) for row in batch_rows)
            for unmasked in (False, True):
                torch.testing.assert_close(loss_sum(model, batch, unmasked=unmasked), want, rtol=1e-5, atol=0)


def test_a_module_around_a_model_is_given_no_placeholder():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.seen = inner, inner.config, []

        def forward(self, input_ids, attention_mask=None):
            self.seen.append(attention_mask)
            return self.inner(input_ids, attention_mask=attention_mask, use_cache=False)

    model, batch_rows = build("Llama", {}), rows([9, 9])
    assert attention.use(model)
    around, want = Around(model), sum(alone(model, row) for row in batch_rows)
    torch.testing.assert_close(loss_sum(around, pad(batch_rows), unmasked=True), want, rtol=1e-5, atol=0)
    assert around.seen == [None]


def test_the_order_of_rows_and_their_company_do_not_matter():
    model = build("Llama", {})
    assert attention.use(model)
    batch_rows = rows([9, 26, 4, 14])
    apart = sum(loss_sum(model, pack([row])) for row in batch_rows)
    torch.testing.assert_close(loss_sum(model, pack(batch_rows[::-1])), apart, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_packed_are_left_alone(name):
    kind, extra, why = REFUSED[name]
    model = build(kind, extra)
    before = model.config._attn_implementation
    batch_rows = rows([9, 4, 14])
    assert not attention.use(model)
    assert any(part in attention.reason(model) for part in ([why] if isinstance(why, str) else why)), attention.reason(model)
    assert model.config._attn_implementation == before and not attention.installed(model)
    with pytest.raises(WeftError) as caught:
        loss_sum(model, pack(batch_rows))
    assert "set data.packing to false" in str(caught.value) and attention.reason(model) in str(caught.value)
    want = sum(alone(model, row) for row in batch_rows)
    torch.testing.assert_close(loss_sum(model, pad(batch_rows)), want, rtol=1e-5, atol=0)


def test_trying_a_model_out_leaves_no_trace():
    model = build("Llama", dict(attention_dropout=0.5))
    model.train()
    model.model.layers[0].eval()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert attention.use(model) and attention.use(model)
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    assert not attention.use(nn.Linear(2, 2)) and attention.reason(nn.Linear(2, 2)) == ""


def test_a_trial_that_is_cut_off_leaves_the_model_its_own_attention(monkeypatch):
    model = build("Llama", {})

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "packed_kwargs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attention.use(model)
    assert model.config._attn_implementation == "sdpa" and not attention.installed(model)
    monkeypatch.undo()
    assert attention.use(model)


def test_dropout_works_on_packed_rows():
    model = build("Llama", dict(attention_dropout=0.5)).train()
    assert attention.use(model)
    batch = pack(rows([9, 26]))
    assert loss_sum(model, batch) != loss_sum(model, batch)


def test_checkpointed_layers_give_the_same_gradients():
    model = build("Llama", {}).train()
    assert attention.use(model)
    batch = pack(rows([9, 26, 5]))
    want = gradients(model, loss_sum(model, batch))
    newer = hasattr(model, "activation_checkpointing_enable")  # transformers 5.23 renamed it
    (model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable)()
    close(gradients(model, loss_sum(model, batch)), want, 1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it itself
def test_a_compiled_layer_gives_the_same_loss():
    model = build("Llama", {})
    assert attention.use(model)
    batch = pack(rows([9, 26, 5]))
    want = loss_sum(model, batch)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(loss_sum(model, batch), want, rtol=1e-5, atol=0)


def test_the_head_runs_only_where_loss_is_borne():
    model = build("Llama", {})
    assert attention.use(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    batch = pack(rows([9, 26, 5]))
    loss_sum(model, batch)
    assert seen == [(1, batch.n_targets, 97)]


def test_16_bit_logits_are_summed_in_fp32():
    model = build("Llama", {}).bfloat16()
    assert attention.use(model)
    loss = loss_sum(model, pack(rows([9, 26])))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sum(alone(model, r).float() for r in rows([9, 26])), rtol=2e-2, atol=0)


class Tiny(nn.Module):
    """Not from transformers: a causal average and a head."""

    def __init__(self, wrap: bool) -> None:
        super().__init__()
        self.embed, self.head, self.wrap = nn.Embedding(97, 8), nn.Linear(8, 97), wrap

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        logits = self.head(x)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits) if self.wrap else logits


@pytest.mark.parametrize("wrap", [False, True])
def test_any_module_can_be_trained_on_padded_batches(wrap):
    torch.manual_seed(0)
    model = Tiny(wrap)
    batch_rows = rows([9, 26, 5])
    wrapped = model if wrap else lambda ids: transformers.modeling_outputs.CausalLMOutput(logits=model(ids))
    want = sum(alone(wrapped, row) for row in batch_rows)
    torch.testing.assert_close(loss_sum(model, pad(batch_rows)), want, rtol=1e-5, atol=0)
    with pytest.raises(WeftError, match="Tiny got a packed batch"):
        loss_sum(model, pack(batch_rows))


def test_a_module_without_logits_is_named():
    with pytest.raises(WeftError, match="it returned dict"):
        loss_sum(type("Odd", (nn.Module,), {"forward": lambda self, input_ids: {}})(), pad(rows([3])))


def test_arguments_are_seen_through_wrappers():
    model = build("Llama", {})
    assert {"logits_to_keep", "use_cache", "attention_mask"} <= accepts(model)
    assert accepts(torch.compile(model, backend="eager")) == accepts(model)
    assert accepts(Tiny(True)) == {"input_ids"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: only there does the host wait")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_the_host_never_waits_in_a_packed_step():
    model = build("Llama", {}).cuda().bfloat16()
    assert attention.use(model)
    batch = pack(rows([9, 26, 5])).to("cuda")
    loss_sum(model, batch).backward()  # lazy set-up of libraries
    want = loss_sum(model, pack(rows([9, 26, 5])).to("cuda")).detach()
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = loss_sum(model, batch)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.detach(), want)
