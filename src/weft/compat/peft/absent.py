"""What this face does not have: peft's other methods, and the packages that peft asks after. Scripts may import all of these names."""

from __future__ import annotations

from typing import Any

_METHODS = [
    "Adamss", "AdaptionPrompt", "Beft", "BOFT", "C3A", "Deft", "Delora", "FourierFT", "Frod", "Glora", "Gralora", "HRA", "Hira",
    "Lily", "Miss", "OSF", "Peanut", "Poly", "Psoft", "Pvera", "RandLora", "Road", "Shadow", "Shira", "Supertuning", "TinyLora",
    "UniLora", "VBLoRA", "WaveFT", "XLora",
]  # fmt: skip
_OTHERS = [
    "BdLoraConfig", "CartridgeConfig", "CPTConfig", "KasaConfig", "MontecloraConfig", "MultitaskPromptTuningConfig",
    "VeloraConfig", "CartridgeEncoder", "CPTEmbedding", "MultitaskPromptTuningInit", "PrefixEncoder", "PromptEmbedding",
    "PromptEncoder", "bloom_model_postprocess_past_key_value", "compose_cartridge_adapters",
    "create_arrow_model", "find_kappa_target_modules", "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text", "preprocess_loraga", "prompt_embeddings_from_past_key_values",
]  # fmt: skip
NAMES = frozenset([f"{m}{end}" for m in _METHODS for end in ("Config", "Model")] + _OTHERS)
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}  # no model of today needs one


class Absent:
    """A name of peft's that a script may import, and that says so when it is used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{type(self).__name__}: weft does not have this of peft; docs/peft.md says what there is instead")


def absent(name: str) -> type[Absent]:
    """The class that stands for a name."""
    return type(name, (Absent,), {"__module__": "weft.compat.peft"})


def _no() -> bool:
    return False


is_bnb_available = is_bnb_4bit_available = is_auto_gptq_available = is_gptqmodel_available = is_aqlm_available = _no
is_auto_awq_available = is_eetq_available = is_hqq_available = is_inc_available = is_torchao_available = is_xpu_available = _no
is_torch_tpu_available = is_optimum_available = is_diffusers_available = _no
