"""Adapters of several methods on one model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from weft.compat.peft import status
from weft.compat.peft.config import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, listed
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.layers import every
from weft.compat.peft.state import load_peft_weights, set_peft_model_state_dict
from weft.compat.peft.switching import enable
from weft.compat.peft.tuner import BaseTuner
from weft.compat.peft.tuners_more import TUNERS
from weft.core import Front

COMPATIBLE = (PeftType.LORA, PeftType.ADALORA, PeftType.LOHA, PeftType.LOKR, PeftType.OFT)


def _check(config: PeftConfig) -> None:
    if config.peft_type not in COMPATIBLE:
        kinds, kind = [k.value for k in COMPATIBLE], getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"The provided `peft_type` '{kind}' is not compatible with the `PeftMixedModel`. Compatible types are: {kinds}"
        )


class PeftMixedModel(Front):
    """A model whose adapters may be of different methods. It cannot be saved as one; load each adapter from its own folder."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        _check(peft_config)
        self.training = model.training
        self.modules_to_save: set[str] | None = None
        self.base_model = MixedModel(model, {adapter_name: peft_config}, adapter_name)
        self.set_modules_to_save(peft_config, adapter_name)

    @property
    def behind(self) -> nn.Module:
        return self.base_model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> list[str] | str:
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def config(self) -> Any:
        """The base's own configuration."""
        return getattr(self.base_model.model, "config", {"model_type": "custom"})

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Remember which modules an adapter trains whole."""
        wanted = getattr(peft_config, "modules_to_save", None)
        if wanted:
            self.modules_to_save = set(wanted) | (self.modules_to_save or set())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        model: Any = self.base_model.model
        return model.generate(*args, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return status.count(self)

    def print_trainable_parameters(self) -> None:
        """The line that says how many of the parameters train."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the base computes alone."""
        try:
            enable(self.base_model.model, False)
            yield
        finally:
            enable(self.base_model.model, True)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False) -> None:
        """One more adapter, of any compatible method."""
        _check(peft_config)
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        with listed(self.peft_config, adapter_name, peft_config):
            self.base_model.inject_adapter(self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        self.set_modules_to_save(peft_config, adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapters that work: one or several, of any method."""
        names = every(adapter_name)
        missing = set(names) - set(self.peft_config)
        if missing:
            raise ValueError(f"Adapter(s) {sorted(missing)} not found, available adapters: {sorted(self.peft_config)}")
        self.base_model.set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take adapters off."""
        names = every(adapter_name)
        missing = set(names) - set(self.peft_config)
        if missing:
            raise ValueError(f"Adapter(s) {sorted(missing)} not found, available adapters: {sorted(self.peft_config)}")
        for name in names:
            self.base_model.delete_adapter(name)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The plain model with the adapters in its weights."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The plain model."""
        return self.base_model.unload(*args, **kwargs)

    def get_layer_status(self) -> None:
        """Not offered for mixed models, as in peft."""
        raise TypeError(f"get_layer_status is not supported for {self.__class__.__name__}.")

    def get_model_status(self) -> None:
        """Not offered for mixed models, as in peft."""
        raise TypeError(f"get_model_status is not supported for {self.__class__.__name__}.")

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """A saved adapter as one more."""
        if adapter_name not in self.peft_config:
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(PeftConfig._get_peft_type(model_id))]
            config = kind.from_pretrained(model_id)
            config.inference_mode = True
            self.add_adapter(adapter_name, config)
        result = set_peft_model_state_dict(self, load_peft_weights(str(model_id)), adapter_name)
        result.missing_keys[:] = [k for k in result.missing_keys if f".{adapter_name}" in k]
        self.eval()
        return result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not offered for mixed models, as in peft."""
        raise NotImplementedError(f"Saving is not supported for {self.__class__.__name__} (yet).")

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False,
        config: PeftConfig | None = None, **kwargs: Any,
    ) -> PeftMixedModel:  # fmt: skip
        """A model with a saved adapter, ready for adapters of other methods."""
        found = config or PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(PeftConfig._get_peft_type(model_id))].from_pretrained(model_id, **kwargs)
        _check(found)
        found.inference_mode = not is_trainable
        made = cls(model, found, adapter_name)
        made.load_adapter(model_id, adapter_name)
        return made


class MixedModel(BaseTuner):
    """The tuner of a mixed model: each adapter is built as its own method's tuner would."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        tuner = TUNERS[PeftType(self.peft_config[adapter_name].peft_type)]
        self.KIND, self.prefix = tuner.KIND, tuner.prefix  # type: ignore[misc]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
