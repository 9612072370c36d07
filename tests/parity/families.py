"""Small random models of the families that weft promises, with inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.conftest import ConvNet, Plain

# The smallest shapes that still have grouped keys, several heads and two layers.
DECODER: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
ENCODER: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    pad_token_id=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    task: str | None = "CAUSAL_LM"
    linear: Any = "all-linear"  # what LoRA stands on
    dense: Any = None  # what the methods for linear layers alone stand on, where that is less
    ia3: tuple[list[str], list[str]] | None = None  # targets and feed-forward modules where peft has no table for the family
    norms: tuple[str, ...] = ()  # layer norms, for LayerNorm tuning
    words: str | None = ""  # the embedding whose tokens are trained, where the model does not say it; None: there is none


def _ids() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"input_ids": torch.randint(3, 60, (2, 7))}


def _seq2seq() -> dict[str, Tensor]:
    return _ids() | {"decoder_input_ids": torch.randint(3, 60, (2, 5))}


def _pixels() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _decoder(name: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**DECODER | more)
        return getattr(transformers, f"{name}ForCausalLM")(config)  # type: ignore[no-any-return]

    return make


def _of(model: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**values))


def _clip() -> nn.Module:
    text = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def _qwen2_vl() -> nn.Module:
    text = DECODER | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0], "rope_type": "default"}, "head_dim": 4}
    vision = dict(
        depth=1, embed_dim=16, num_heads=2, hidden_size=16, mlp_ratio=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2
    )
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=61,
        video_token_id=62,
        vision_start_token_id=59,
        vision_end_token_id=60,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _picture_and_text() -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (1, 9))
    ids[0, 1], ids[0, 2:6], ids[0, 6] = 59, 61, 60  # start, 4 × 4 patches merged two by two, end
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 61).int(),
    }


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _sound() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": torch.randint(3, 60, (2, 5))}


EXPERTS: dict[str, Any] = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
FAMILIES: dict[str, Family] = {
    "Llama": Family(_decoder("Llama"), _ids, norms=("input_layernorm",)),
    "Mistral": Family(_decoder("Mistral"), _ids, norms=("input_layernorm",)),
    "Qwen2": Family(_decoder("Qwen2"), _ids, norms=("input_layernorm",)),
    "Qwen3": Family(_decoder("Qwen3"), _ids, norms=("input_layernorm",), ia3=(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "Gemma 2": Family(_decoder("Gemma2", query_pre_attn_scalar=4, sliding_window=4), _ids, norms=("input_layernorm",)),
    "Gemma 3": Family(
        _of("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER | dict(query_pre_attn_scalar=4, sliding_window=4)),
        _ids,
        norms=("input_layernorm",),
        ia3=(["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    ),
    "Phi-3": Family(_decoder("Phi3", rope_scaling=None), _ids, norms=("input_layernorm",), ia3=(["qkv_proj", "down_proj"], ["down_proj"])),
    "GPT-2": Family(
        _of(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=64,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
        _ids,
        norms=("ln_1",),
    ),
    "GPT-NeoX": Family(_decoder("GPTNeoX"), _ids, norms=("input_layernorm",)),
    "OPT": Family(
        _of(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=64,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            pad_token_id=0,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        _ids,
        norms=("self_attn_layer_norm",),
        ia3=(["k_proj", "v_proj", "fc2"], ["fc2"]),
    ),
    "Mixtral": Family(
        _decoder("Mixtral", **EXPERTS), _ids, linear=["q_proj", "v_proj"], norms=("input_layernorm",), ia3=(["k_proj", "v_proj"], [])
    ),
    "Qwen3-MoE": Family(
        _decoder("Qwen3Moe", **EXPERTS), _ids, linear=["q_proj", "v_proj"], norms=("input_layernorm",), ia3=(["k_proj", "v_proj"], [])
    ),
    "BERT": Family(
        _of("BertForSequenceClassification", "BertConfig", **ENCODER), _ids, "SEQ_CLS", ["query", "value", "dense"], norms=("LayerNorm",)
    ),
    "RoBERTa": Family(
        _of("RobertaForTokenClassification", "RobertaConfig", **ENCODER), _ids, "TOKEN_CLS", ["query", "value"], norms=("LayerNorm",)
    ),
    "DeBERTa-v2": Family(
        _of("DebertaV2ForSequenceClassification", "DebertaV2Config", **ENCODER),
        _ids,
        "SEQ_CLS",
        ["query_proj", "value_proj", "dense"],
        norms=("LayerNorm",),
    ),
    "T5": Family(
        _of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=64,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        ),
        _seq2seq,
        "SEQ_2_SEQ_LM",
        norms=("layer_norm",),
    ),
    "BART": Family(
        _of(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=64,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            dropout=0.0,
        ),
        _seq2seq,
        "SEQ_2_SEQ_LM",
        norms=("self_attn_layer_norm",),
    ),
    "Whisper": Family(
        _whisper, _sound, None, ["q_proj", "v_proj", "fc1"], ia3=(["k_proj", "v_proj", "fc2"], ["fc2"]), norms=("self_attn_layer_norm",)
    ),
    "ViT": Family(
        _of(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        _pixels,
        None,
        "all-linear",
        ia3=(["k_proj", "v_proj", "fc2"], ["fc2"]),
        norms=("layernorm_before",),
        words=None,
    ),
    "CLIP": Family(
        _clip,
        lambda: _ids() | _pixels(),
        None,
        ["q_proj", "v_proj", "fc1", "patch_embedding"],
        ["q_proj", "v_proj"],
        ia3=(["k_proj", "v_proj", "fc2"], ["fc2"]),
        norms=("layer_norm1",),
        words="token_embedding",
    ),
    "Qwen2-VL": Family(
        _qwen2_vl,
        _picture_and_text,
        None,
        ["q_proj", "v_proj", "qkv", "down_proj"],
        ia3=(["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        norms=("input_layernorm",),
    ),
    "Mamba": Family(
        _of(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=64,
            hidden_size=16,
            state_size=4,
            num_hidden_layers=2,
            time_step_rank=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _ids,
        linear=["in_proj", "x_proj"],
        ia3=(["in_proj", "x_proj"], []),
        norms=("norm",),
    ),
    "a plain module": Family(
        Plain,
        lambda: {"ids": _ids()["input_ids"] % 40},
        None,
        ["up", "down", "embed"],
        ["up", "down"],
        ia3=(["up", "down"], ["down"]),
        norms=("norm",),
        words="embed",
    ),
    "a convolutional net": Family(
        ConvNet, lambda: {"x": torch.randn(2, 3, 8, 8)}, None, ["third", "out"], ["out"], ia3=(["second", "out"], ["out"]), words=None
    ),
}
