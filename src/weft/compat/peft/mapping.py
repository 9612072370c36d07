"""`get_peft_model` and `inject_adapter_in_model`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weft.compat.peft.config import PeftConfig
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.layers import fronts
from weft.compat.peft.mixed import PeftMixedModel
from weft.compat.peft.model import PeftModel, warn_of_prefix
from weft.compat.peft.saving import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from weft.compat.peft.tuners_more import TUNERS


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """A model with a new adapter. The model is changed in place, but none of its weights.

    Args:
        model: Any module; a transformers model if `peft_config.task_type` is set.
        peft_config: Which method, with what settings, where.
        mixed: Allow adapters of several methods on one model.
    """
    before = peft_config.base_model_name_or_path
    peft_config.base_model_name_or_path = name = model.__dict__.get("name_or_path") or None
    if fronts(model):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a different config, "
            "make sure to call `.unload()` before.",
            stacklevel=2,
        )
    if before is not None and before != name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{name}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with revision {revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    warn_of_prefix(adapter_name, peft_config.peft_type)
    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    task = peft_config.task_type
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, None if peft_config.is_prompt_learning else PeftModel)
    if kind is None:
        raise KeyError(task)
    return kind(
        model, peft_config, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model itself, with fronts at its adapted layers and no PeftModel around it.

    Args:
        state_dict: If given, its keys say which layers to adapt.
    """
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError("`create_and_replace` does not support prompt learning, adaption prompt and shadow yet.")
    kind = peft_config.peft_type
    if kind not in TUNERS:
        raise ValueError(f"`inject_adapter_in_model` does not support {kind} yet. Please use `get_peft_model`.")
    tuner = TUNERS[PeftType(kind)]
    if tuner.uses_shared_state:
        raise ValueError(
            f"`inject_adapter_in_model` does not support {kind} because it uses shared state stored on the tuner. "
            "Please use `get_peft_model` instead."
        )
    made = tuner(model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
    return made.model
