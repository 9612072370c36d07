"""The face of the `peft` package over weft: `import weft.compat.peft as peft`.

What stands here is views on weft's own adapters; no method is computed twice. `docs/peft.md` says how a script moves, and what is refused.
"""

from __future__ import annotations

import sys
from typing import Any

from weft.compat.peft import (
    absent,
    bridging,
    config,
    configs,
    configs_lora,
    defaults,
    eva,
    families,
    helpers,
    hotswap,
    incremental_pca,
    kinds,
    layers,
    layers_lora,
    loftq,
    mapping,
    merging,
    mixed,
    model,
    optimizers,
    parameters,
    places,
    small,
    state,
    status,
    switching,
    targets,
    tasks,
    tokens,
    tuner,
    tuners_more,
    wrappers,
)
from weft.compat.peft.config import PEFT_TYPE_TO_CONFIG_MAPPING, VERSION, PeftConfig, PromptLearningConfig, get_peft_config
from weft.compat.peft.configs import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    TrainableTokensConfig,
    VeraConfig,
)
from weft.compat.peft.configs_lora import AdaLoraConfig, ArrowConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig, LoraRuntimeConfig
from weft.compat.peft.conversion import convert_to_lora, save_as_lora
from weft.compat.peft.eva import get_eva_state_dict, initialize_lora_eva_weights
from weft.compat.peft.helpers import (
    cast_mixed_precision_params,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)
from weft.compat.peft.kinds import NoMatchingPeftModuleError, PeftError, PeftType, PeftWarning, TaskType
from weft.compat.peft.loftq import replace_lora_weights_loftq
from weft.compat.peft.mapping import get_peft_model, inject_adapter_in_model
from weft.compat.peft.mixed import COMPATIBLE, PeftMixedModel
from weft.compat.peft.model import PeftModel
from weft.compat.peft.saving import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from weft.compat.peft.state import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from weft.compat.peft.status import get_layer_status, get_model_status
from weft.compat.peft.tasks import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from weft.compat.peft.tuners_more import (
    PREFIXES as PEFT_TYPE_TO_PREFIX_MAPPING,
)
from weft.compat.peft.tuners_more import (
    TUNERS as PEFT_TYPE_TO_TUNER_MAPPING,
)
from weft.compat.peft.tuners_more import (
    AdaLoraModel,
    IA3Model,
    LNTuningModel,
    LoHaModel,
    LoKrModel,
    LoraModel,
    OFTModel,
    TrainableTokensModel,
    VeraModel,
)

__version__ = VERSION
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING = absent.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = {k: PEFT_TYPE_TO_TUNER_MAPPING[k] for k in COMPATIBLE}
__all__ = sorted(
    k for k, v in globals().items() if not k.startswith("_") and k not in ("annotations", "sys", "Any") and type(v) is not type(sys)
)
__all__ += ["install", *absent.NAMES]


def __getattr__(name: str) -> Any:
    if name in absent.NAMES:
        globals()[name] = absent.absent(name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Let `import peft` mean this package, in all of this process: for transformers' Trainer and TRL, which import peft themselves."""
    places.install(VERSION)


places.build(sys.modules[__name__])
