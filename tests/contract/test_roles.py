"""Which layers "auto" means, in families that name them differently; and what the methods refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import weft
from tests.conftest import Plain, jolt, llama
from weft.adapters import attached
from weft.methods.blocks import role

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)
BART = dict(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48)  # fmt: skip
GQA = dict(num_key_value_heads=2, head_dim=8)
LLAMA = {"key": "k_proj", "value": "v_proj", "attention": "o_proj", "feedforward": "down_proj"}
OPT = {"key": "k_proj", "value": "v_proj", "attention": "out_proj", "feedforward": "fc2"}
NEOX = {"fused": "query_key_value", "attention": "dense", "feedforward": "dense_4h_to_h"}
BERT = {"key": "key", "value": "value", "attention": "dense", "feedforward": "dense"}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)), LLAMA),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, **GQA)), LLAMA),
    "phi3": (
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL)),
        {"fused": "qkv_proj", "attention": "o_proj", "feedforward": "down_proj"},
    ),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_key_value_heads=2)), LLAMA | {"feedforward": "mlp"}),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)),
        {"fused": "c_attn", "attention": "c_proj", "feedforward": "c_proj"},
    ),
    "neox": (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)), NEOX),
    "falcon": (lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL)), NEOX),
    "opt": (
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32)
        ),
        OPT,
    ),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)), OPT),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)),
        {"key": "k", "value": "v", "attention": "o", "feedforward": "wo"},
    ),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL)), BERT),
    "deberta": (lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**SMALL)), BERT | {"key": "key_proj", "value": "value_proj"}),
    "distilbert": (
        lambda: tf.DistilBertForMaskedLM(tf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=4)),
        {"key": "k_lin", "value": "v_lin", "attention": "out_lin", "feedforward": "lin2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_blocks_are_found(family: str) -> None:
    make, want = FAMILIES[family]
    with torch.device("meta"):
        model = make()
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if kind := role(path, module):
            found.setdefault(kind, []).append(path)
    assert {kind: {p.rpartition(".")[2] for p in paths} for kind, paths in found.items()} == {k: {v} for k, v in want.items()}
    stacks = {"bart": (3, 2), "t5": (3, 2)}.get(family, (1, 1))  # an encoder-decoder attends three times
    assert (len(found["attention"]), len(found["feedforward"])) == stacks, found


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: weft.adapt(llama(), weft.BitFit()), r"nothing that BitFit can adapt[\s\S]*add=True"),
        (lambda: weft.adapt(llama(), weft.BitFit(targets="q_proj")), r"add=True"),
        (lambda: weft.adapt(Plain(), weft.IA3()), r"targets='auto' .* leaves no layer"),
        (lambda: weft.adapt(llama(), weft.IA3(targets="embed_tokens")), "matches only Embedding"),
        (lambda: weft.adapt(llama(), weft.LoRA(targets="auto")), 'LoRA has no targets="auto"'),
        (lambda: weft.Bottleneck(reduction=0), "a reduction of 0"),
        (lambda: weft.Bottleneck(nonlinearity="step"), "there are relu, gelu, silu, tanh"),  # type: ignore[arg-type]
        (lambda: weft.Bottleneck(kind="serial"), "there are 'houlsby', 'pfeiffer' and 'parallel'"),  # type: ignore[arg-type]
        (lambda: weft.adapt(FAMILIES["opt"][0](), weft.Bottleneck(kind="parallel")), "none is a module of its own"),
        (lambda: weft.adapt(Plain(), weft.Bottleneck()), "leaves no layer"),
        (lambda: weft.merge(weft.adapt(llama(), weft.Bottleneck())), "no change of weights"),
        (lambda: weft.LoHa(rank=0), "LoHa cannot be built with a rank of 0"),
        (lambda: weft.LoKr(module_dropout=1.0), "LoKr cannot be built with a module_dropout of 1.0"),
        (lambda: weft.LoKr(decompose_factor=0), "a decompose_factor of 0"),
        (lambda: weft.OFT(blocks=4), "either a block_size or a number of blocks"),
        (lambda: weft.OFT(module_dropout=-1), "a module_dropout of -1"),
        (lambda: weft.adapt(Plain(), weft.OFT(targets="embed")), "matches only Embedding"),
        (lambda: weft.adapt(nn.Sequential(nn.Linear(2, 2)), weft.LNTuning()), "leaves no layer"),
    ],
)
def test_what_is_refused(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(weft.WeftError, match=words):
        wrong()


@pytest.mark.parametrize("family", ["mixtral", "bert", "t5"])
def test_bottlenecks_stand_in_every_family(family: str) -> None:
    """Also around a block of fused experts, and they begin as nothing."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    batch = {name: torch.arange(3, 15).view(2, 6) for name in ("input_ids", *(["decoder_input_ids"] if family == "t5" else []))}
    with torch.no_grad():
        before = model(**batch).logits
        for kind in ("houlsby", "pfeiffer") + (() if family == "bert" else ("parallel",)):
            weft.adapt(model, weft.Bottleneck(kind=kind, reduction=4), name=kind)  # type: ignore[arg-type]
            assert torch.equal(model(**batch).logits, before)
            jolt(nn.ModuleList(attached(model, kind).values()))
            assert (model(**batch).logits - before).abs().max() > 1e-4


def test_biases_that_two_modules_share_stay_shared() -> None:
    model = FAMILIES["bert"][0]()
    weft.adapt(model, weft.BitFit())
    parts = attached(model, "default")
    assert parts["cls.predictions.decoder"].bias is parts["cls.predictions"].bias
