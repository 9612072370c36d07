"""A classifier's head that nobody trains is told, in the summary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import weft
import weft.compat.peft as face
from tests.conftest import gpt2, llama
from tests.parity.families import DECODER, ENCODER

T5 = dict(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)
DISTILBERT = dict(vocab_size=64, dim=16, hidden_dim=24, n_layers=1, n_heads=4, max_position_embeddings=40)
TWO = dict(num_labels=2)
HEADS: list[tuple[str, str, dict[str, Any], dict[str, int]]] = [  # the heads, and how many parameters each has
    ("LlamaForSequenceClassification", "LlamaConfig", DECODER | TWO, {"score": 32}),
    ("LlamaForQuestionAnswering", "LlamaConfig", DECODER, {"qa_outputs": 34}),
    ("BertForSequenceClassification", "BertConfig", ENCODER | TWO, {"classifier": 34}),
    ("BertForTokenClassification", "BertConfig", ENCODER | TWO, {"classifier": 34}),
    ("BertForQuestionAnswering", "BertConfig", ENCODER, {"qa_outputs": 34}),
    ("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT | TWO, {"pre_classifier": 272, "classifier": 34}),
    ("T5ForQuestionAnswering", "T5Config", T5, {"qa_outputs": 34}),
]


def make(model: str, config: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**values))


@pytest.mark.parametrize(("model", "config", "values", "heads"), HEADS, ids=[h[0] for h in HEADS])
def test_a_head_that_stays_frozen_is_told_with_what_to_write(model: str, config: str, values: Any, heads: dict[str, int]) -> None:
    base = make(model, config, values)
    assert weft.summary(base).notes == ()
    (note,) = weft.summary(weft.adapt(base, weft.LoRA(rank=2, targets="re:.*(q|q_proj|query|q_lin)"))).notes
    assert note in str(weft.summary(base)).splitlines()[-1]
    assert all(f"{name} ({count:,d} parameters)" in note for name, count in heads.items())
    wanted = next(iter(heads)) if len(heads) == 1 else list(heads)
    assert f"modules_to_save={wanted!r}" in note
    weft.remove(base)
    trained = weft.adapt(base, weft.LoRA(rank=2, targets="re:.*(q|q_proj|query|q_lin)", modules_to_save=wanted))
    assert weft.summary(trained).notes == ()
    with weft.using(trained, None):
        assert weft.summary(trained).notes == ()


def test_only_what_is_left_is_told() -> None:
    base = make(*HEADS[5][:3])
    (note,) = weft.summary(weft.adapt(base, weft.IA3(targets="q_lin", feedforward=(), modules_to_save="classifier"))).notes
    assert "pre_classifier" in note and " classifier" not in note and "modules_to_save='pre_classifier'" in note
    weft.adapt(base, weft.LoRA(rank=2, targets=("q_lin", "pre_classifier", "classifier")), name="low")  # a LoRA on a head trains it
    assert weft.summary(base).notes == ()


def test_language_models_and_the_face_say_nothing() -> None:
    assert weft.summary(weft.adapt(llama(), weft.LoRA(rank=2))).notes == weft.summary(weft.adapt(gpt2(), weft.LoRA(rank=2))).notes == ()
    config = face.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])  # adds the head itself, as peft does
    assert weft.summary(face.get_peft_model(make(*HEADS[2][:3]), config)).notes == ()
    bare = face.LoraConfig(r=2, target_modules=["query"])
    assert len(weft.summary(face.get_peft_model(make(*HEADS[2][:3]), bare)).notes) == 1
