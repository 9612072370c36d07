"""Saving and loading a PeftModel, and the card beside it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save as to_bytes
from torch import nn

from weft.adapters.files import write_atomically
from weft.compat.peft.config import PEFT_TYPE_TO_CONFIG_MAPPING, VERSION, PeftConfig
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.starts import as_plain
from weft.compat.peft.state import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from weft.compat.peft.tuner import shown_name
from weft.core import base_class

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, Any] = {}  # the task's name -> its class; filled where those are


class Saving:
    """The part of PeftModel that has to do with files."""

    peft_config: dict[str, Any]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters: the one called "default" into the folder, any other into a folder of its name inside; a card beside them.

        Args:
            path_initial_model_for_weight_conversion: Where the adapter was saved before training. What is written is then a LoRA of twice
                the rank for the base as it was before PiSSA or OLoRA took their start out of it.
        Raises ValueError for a path that is a file, and for adapters that are not there.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        have = list(self.peft_config)
        chosen = have if selected_adapters is None else selected_adapters
        if any(name not in have for name in chosen):
            raise ValueError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are {have} - got {chosen}."
            )
        if is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            self.create_or_update_model_card(folder)
        for name in chosen:
            self._save_one(name, folder if name == "default" else folder / name, safe_serialization, save_embedding_layers,
                           is_main_process, kwargs.get("state_dict"), path_initial_model_for_weight_conversion)  # fmt: skip

    def _save_one(
        self, name: str, folder: Path, safe: bool, embeddings: str | bool, main: bool, state: Mapping[str, Any] | None,
        initial: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        me: Any = self
        config = self.peft_config[name]
        tensors = get_peft_model_state_dict(me, state_dict=state, adapter_name=name, save_embedding_layers=embeddings)
        if config.is_prompt_learning:
            tensors |= me.prompt_network(name)
        if not main:
            return
        before = config.inference_mode
        if initial is not None:
            config, tensors = as_plain(config, tensors, initial)
        folder.mkdir(parents=True, exist_ok=True)
        if safe:
            apart = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
            write_atomically({folder / SAFETENSORS_WEIGHTS_NAME: to_bytes(apart, metadata={"format": "pt"})})
        else:
            torch.save(dict(tensors), folder / WEIGHTS_NAME)
        model = me.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
        mapping = None
        if config.task_type is None:
            mapping = {"base_model_class": shown_name(model), "parent_library": base_class(model).__module__}
        config.inference_mode = True
        try:
            config.save_pretrained(folder, auto_mapping_dict=mapping)
        finally:
            config.inference_mode = before

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A model with a saved adapter on it, which works and, unless `is_trainable`, does not train."""
        if config is None:
            where = {k: kwargs.get(k) for k in ("subfolder", "revision", "cache_dir", "token")}
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(PeftConfig._get_peft_type(model_id, **where))]
            config = kind.from_pretrained(model_id, **kwargs)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        assert config is not None
        config.inference_mode = not is_trainable
        if ephemeral_gpu_offload and not hasattr(config, "runtime_config"):
            warnings.warn("Ephemeral GPU offloading is not supported for this model. Ignoring.", stacklevel=2)
        if key_mapping is None and not config.is_prompt_learning:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        kind_of_model = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls)
        made = kind_of_model(
            model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
        )
        result = made.load_adapter(
            model_id, adapter_name, is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage, key_mapping=key_mapping, **kwargs,
        )  # fmt: skip
        if result.missing_keys:
            warnings.warn(f"Found missing adapter keys while loading the checkpoint: {list(result.missing_keys)}.", stacklevel=2)
        return made

    def _get_peft_specific_model_tags(self) -> list[str]:
        me: Any = self
        tags = ["transformers"] if hasattr(me.get_base_model(), "generation_config") or hasattr(me.get_base_model(), "config") else []
        if me.peft_type == PeftType.LORA:
            tags.append("lora")
        if getattr(me.base_model, "name_or_path", None) is not None:
            tags.append(f"base_model:adapter:{me.base_model.name_or_path}")
        return tags

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """README.md: the library, the tags that the hub looks for, the base and the version. What a person wrote into it stays."""
        me: Any = self
        path = Path(output_dir) / "README.md"
        card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
        card.data["library_name"] = "peft"
        model = me.get_base_model()
        tags = set(getattr(model, "model_tags", None) or ()) | set(self._get_peft_specific_model_tags())
        if tags:
            card.data["tags"] = sorted(tags)
        if not card.data.pipeline_tag and any(c.__name__ == "PeftModelForCausalLM" for c in type(self).__mro__):
            card.data.pipeline_tag = "text-generation"
        values = me.base_model.get_model_config(model) if hasattr(me.base_model, "get_model_config") else {}
        origin = values.get("_name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None)
        if origin:
            card.data["base_model"] = origin
        lines = card.text.splitlines()
        heading, version = "### Framework versions", f"- PEFT {VERSION}"
        if version not in lines:
            if heading in lines:
                lines.insert(lines.index(heading) + 2, version)
            else:
                lines.append(f"{heading}\n\n{version}")
        card.text = "\n".join(lines)
        card.save(path)
