"""PeftModel: what scripts hold in their hands."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import PushToHubMixin

from weft.compat.peft import status
from weft.compat.peft.activated import offsets_of
from weft.compat.peft.config import DOWNLOAD, PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, listed
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.prompting import Prompting
from weft.compat.peft.saving import Saving
from weft.compat.peft.state import load_peft_weights, set_peft_model_state_dict
from weft.compat.peft.tuner import BaseTuner
from weft.compat.peft.tuners_more import PREFIXES, TUNERS
from weft.core import Front

SPECIAL = frozenset({"adapter_names", "alora_offsets"})  # arguments that are for the adapters and not for the model


def warn_of_prefix(adapter_name: str, kind: Any) -> None:
    """peft warns of names that look like its parameters'; the tensors are found by place here, so that nothing is lost."""
    prefix = PREFIXES.get(kind)
    if prefix and adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=3,
        )


def checkpointing(model: Any) -> bool:
    """Whether a model recomputes its blocks in the backward pass; unknown counts as yes, as in peft."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # transformers renamed it
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return True


class PeftModel(Saving, Prompting, PushToHubMixin, Front):
    """A model with adapters.

    Args:
        model: Any module; its layers get fronts in place.
        peft_config: What the first adapter is.
        adapter_name: What it is called.
        autocast_adapter_dtype: 16-bit adapters become fp32.
        low_cpu_mem_usage: Make the adapter's tensors without memory, for weights that are loaded afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.active_adapter: Any = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = set(SPECIAL)
        self._is_prompt_learning = peft_config.is_prompt_learning
        if peft_config.peft_type not in TUNERS and not self._is_prompt_learning:
            raise ValueError(f"weft does not have the method {getattr(peft_config.peft_type, 'value', peft_config.peft_type)}")
        if self._is_prompt_learning:
            self._peft_config: dict[str, Any] = {}
            self.base_model = model
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            kind = TUNERS[PeftType(peft_config.peft_type)]
            self.base_model = kind(
                model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype
            )
        if checkpointing(model):
            self.prepare_model_for_gradient_checkpointing(model)
        config = getattr(self.base_model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1
        self._adapters_disabled = False

    @property
    def behind(self) -> nn.Module:
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # ---- what it holds

    @property
    def peft_config(self) -> dict[str, Any]:
        return self._peft_config if self._is_prompt_learning else self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        if self._is_prompt_learning:
            self._peft_config = value
        else:
            self.base_model.peft_config = value

    @property
    def active_peft_config(self) -> Any:
        return self.peft_config[self.active_adapter if isinstance(self.active_adapter, str) else self.active_adapter[0]]

    @property
    def active_adapters(self) -> list[str]:
        if isinstance(self.base_model, BaseTuner):
            return self.base_model.active_adapters
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    @property
    def has_active_enabled_adapter(self) -> bool:
        if self._is_prompt_learning:
            return not self._adapters_disabled
        return not self._adapters_disabled or not self.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        found = {m for c in self.peft_config.values() for m in getattr(c, "modules_to_save", None) or ()}
        return found or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The user's own model."""
        return self.base_model if self._is_prompt_learning else self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return status.count(self)

    def print_trainable_parameters(self) -> None:
        """The line that says how many of the parameters train."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The state of every adapted layer."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The state of all adapted layers together."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter could be turned into a LoRA: whether it adds to the weights."""
        return self.peft_type in (PeftType.LORA, PeftType.ADALORA, PeftType.LOHA, PeftType.LOKR)

    # ---- computing

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if isinstance(self.base_model, BaseTuner) and self.has_active_enabled_adapter:
            with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
                yield
        else:
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.base_model(*args, **{k: v for k, v in kwargs.items() if k not in SPECIAL})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`; `adapter_names` gives each row an adapter of its own ("__base__": none).

        Of an activated LoRA the invocation is looked for in all the tokens given, also those that are in `past_key_values` already.
        """
        if kwargs.get("past_key_values") is not None and kwargs.get("alora_offsets") is None and not self._is_prompt_learning:
            ids = kwargs.get("input_ids", args[0] if args else None)
            kwargs["alora_offsets"] = offsets_of(self.get_base_model(), ids, kwargs.get("adapter_names"), self.active_adapters)
        with self._enable_peft_forward_hooks(*args, **kwargs):
            model: Any = self.get_base_model()
            return model.generate(*args, **{k: v for k, v in kwargs.items() if k not in SPECIAL})

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the base computes as if there were no adapter. Changes no weight and no requires_grad."""
        before = self._adapters_disabled
        if self._is_prompt_learning:
            with self.without_prompt():
                self._adapters_disabled = True
                try:
                    yield
                finally:
                    self._adapters_disabled = before
            return
        enabled = self.get_model_status().enabled
        if enabled == "irregular":
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most likely unintentional. "
                "After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=3,
            )
        try:
            self.base_model.disable_adapter_layers()
            self._adapters_disabled = True
            yield
        finally:
            if enabled is not False:
                self.base_model.enable_adapter_layers()
            self._adapters_disabled = before

    # ---- adapters come and go

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
        """One more adapter of the same method. It does not work until `set_adapter` chooses it."""
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        warn_of_prefix(adapter_name, peft_config.peft_type)
        if peft_config.peft_type != self.peft_type:
            raise ValueError(f"Cannot combine adapters with different peft types. Found {self.peft_type} and {peft_config.peft_type}.")
        with listed(self.peft_config, adapter_name, peft_config):
            if peft_config.is_prompt_learning:
                self.attach_prompt(adapter_name, peft_config)
            else:
                self.base_model.inject_adapter(
                    self.base_model.model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
                )

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Let one adapter alone work, and train unless it is for inference."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")
        self.active_adapter = adapter_name
        if self._is_prompt_learning:
            self.use_prompt(adapter_name, inference_mode)
        else:
            self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not."""
        if self._is_prompt_learning:
            kind = getattr(self.peft_type, "value", self.peft_type)
            raise TypeError(f"Setting `requires_grad` is not supported for prompt learning methods like {kind}.")
        self.base_model.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off. If it worked, another one works instead."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if self._is_prompt_learning:
            del self.peft_config[adapter_name]
            self.remove_prompt(adapter_name)
            return
        self.base_model.delete_adapter(adapter_name=adapter_name)
        if len(self.active_adapters) == 1:
            self.active_adapter = self.active_adapters[0]

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A saved adapter as one more; or its weights into the adapter that has this name.

        Returns: `missing_keys` (of this adapter alone) and `unexpected_keys`.
        """
        download = {k: v for k, v in kwargs.items() if k in DOWNLOAD or k == "use_auth_token"}
        if adapter_name not in self.peft_config:
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(PeftConfig._get_peft_type(model_id, **download))]
            config = kind.from_pretrained(model_id, **download)
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
            if is_trainable:
                self.set_requires_grad(adapter_name) if not config.is_prompt_learning else self.set_adapter(adapter_name)
        weights = load_peft_weights(str(model_id), device=torch_device, key_mapping=key_mapping, **download)
        result = set_peft_model_state_dict(
            self, weights, adapter_name, kwargs.get("ignore_mismatched_sizes", False), low_cpu_mem_usage=low_cpu_mem_usage
        )
        prefix = PREFIXES.get(self.peft_type, "")  # type: ignore[call-overload]
        mine = [k for k in result.missing_keys if prefix in k and f".{adapter_name}" in k]
        result.missing_keys[:] = mine
        if low_cpu_mem_usage and isinstance(self.base_model, BaseTuner):
            self.base_model.cast(adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return result

    # ---- gradients through frozen embeddings

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Let gradients flow from the embeddings on, which checkpointed blocks need."""
        if any(getattr(model, f"is_{k}", False) for k in ("loaded_in_8bit", "loaded_in_4bit", "quantized")):
            return
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
