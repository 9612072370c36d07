"""What this face does not have: peft's other methods, and the packages that peft asks after. Scripts may import all of these names."""

from __future__ import annotations

from functools import cache
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
# peft's inner modules of which nothing is here -> what scripts import from there
PLACES: dict[str, str] = {
    "tuners.lora.aqlm": "AqlmLoraLinear", "tuners.lora.arrow": "ArrowLoraLinearLayer create_arrow_model",
    "tuners.lora.awq": "AwqLoraLinear", "tuners.lora.bnb": "Linear8bitLt Linear4bit", "tuners.lora.corda": "preprocess_corda CordaEigens",
    "tuners.lora.dora": "DoraLinearLayer DoraEmbeddingLayer DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer",
    "tuners.lora.eetq": "EetqLoraLinear", "tuners.lora.gptq": "GPTQLoraLinear", "tuners.lora.hqq": "HqqLoraLinear",
    "tuners.lora.inc": "IncLoraLinear", "tuners.lora.intruders": "reduce_intruder_dimension",
    "tuners.lora.loraga": "preprocess_loraga estimate_gradients", "tuners.lora.monteclora": "MontecloraSampler",
    "tuners.lora.te": "TeLinear", "tuners.lora.torchao": "TorchaoLoraLinear", "tuners.lora.tp_layer": "LoraParallelLinear",
    "tuners.lora.velora": "VeloraFunction",
    "tuners.lora.variants": "ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant BlockDiagonalLinear DoraConv1dVariant "
    "DoraConv2dVariant DoraConv3dVariant DoraEmbeddingVariant DoraLinearVariant KasaLinearVariant MiCALinearVariant "
    "MontecloraLinearVariant QALoraLinearVariant VeloraLinearVariant calculate_alora_offsets get_alora_offsets_for_forward "
    "get_alora_offsets_for_generate is_alora_relevant_in_batch",
    "tuners.adalora.bnb": "SVDLinear8bitLt SVDLinear4bit", "tuners.adalora.gptq": "SVDQuantLinear",
    "tuners.ia3.bnb": "Linear8bitLt Linear4bit",
    "tuners.p_tuning.model": "PromptEncoder", "tuners.prefix_tuning.model": "PrefixEncoder",
    "tuners.prompt_tuning.model": "PromptEmbedding",
    "tuners.multitask_prompt_tuning": "MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "tuners.multitask_prompt_tuning.config": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "tuners.cpt": "CPTConfig CPTEmbedding", "tuners.cpt.config": "CPTConfig", "tuners.cartridge.config": "CartridgeConfig",
    "tuners.cartridge": "CartridgeConfig CartridgeEncoder",
    "tuners.cartridge.utils": "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    "prompt_embeddings_from_past_key_values",
    "tuners.xlora.classifier": "XLoraClassifier TemperatureScaledSoftmax", "tuners.poly.router": "PolyRouter get_router",
    "tuners.shira.mask_functions": "random_mask", "tuners._buffer_dict": "BufferDict",
    "optimizers.riemannian": "create_riemannian_optimizer", "utils.quantization_utils": "QuantizationBackend",
}  # fmt: skip
for _method in _METHODS:
    _family = "adaption_prompt" if _method == "AdaptionPrompt" else _method.lower()
    for _part in ("", ".config", ".layer", ".model"):
        PLACES[f"tuners.{_family}{_part}"] = f"{_method}Config {_method}Model {_method}Layer {_method}Linear Linear Conv2d Conv3d Embedding"
INNER = {  # names that other modules lack, which are here
    "tuners.lora": "GPTQLoraLinear create_arrow_model preprocess_loraga", "tuners.lora.layer": "LoraVariant",
    "tuners.adalora": "SVDQuantLinear",
    "tuners.adalora.layer": "SVDConv2d", "optimizers": "create_riemannian_optimizer", "helpers": "KappaTuneSelector MontecloraTrainerMixin",
    "tuners.p_tuning": "PromptEncoder", "tuners.prefix_tuning": "PrefixEncoder", "tuners.prompt_tuning": "PromptEmbedding",
    "tuners": " ".join(sorted(NAMES)),
    "tuners.lora.config": "BdLoraConfig KasaConfig MontecloraConfig VeloraConfig",
}  # fmt: skip
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}  # no model of today needs one


class Absent:
    """A name of peft's that a script may import, and that says so when it is used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{type(self).__name__}: weft does not have this of peft; docs/peft.md says what there is instead")


@cache
def absent(name: str) -> type[Absent]:
    """The class that stands for a name."""
    return type(name, (Absent,), {"__module__": "weft.compat.peft"})
