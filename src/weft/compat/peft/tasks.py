"""PeftModel for each kind of task, and the loading of base and adapter in one call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn

from weft.compat.peft.config import PeftConfig
from weft.compat.peft.model import PeftModel
from weft.compat.peft.saving import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

HEADS = ("classifier", "score")


def _given(arguments: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a caller said, out of a forward whose signature tells a Trainer which columns of a data set the model wants."""
    return {k: v for k, v in arguments.items() if v is not None and k not in ("self", "kwargs", "task_ids", "__class__")} | kwargs


class _WithHead(PeftModel):
    """A task whose head starts untrained, so that it is trained and saved with the adapter."""

    HEADS: ClassVar[tuple[str, ...]] = HEADS

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        self._with_head(peft_config)
        super().__init__(model, peft_config, adapter_name, **kwargs)
        for name, _ in self.get_base_model().named_children():
            if any(head in name for head in self.HEADS):
                self.cls_layer_name = name
                break

    def _with_head(self, config: Any) -> None:
        if hasattr(config, "modules_to_save"):
            own = list(config.modules_to_save or ())
            config.modules_to_save = own + [h for h in self.HEADS if h not in own]

    def add_adapter(self, adapter_name: str, peft_config: Any, **kwargs: Any) -> None:
        self._with_head(peft_config)
        super().add_adapter(adapter_name, peft_config, **kwargs)


class PeftModelForSequenceClassification(_WithHead):
    """For classifying whole texts; trains `classifier` or `score` as well."""

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None,
        output_attentions: Any = None, output_hidden_states: Any = None, return_dict: Any = None,
        task_ids: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return super().forward(**_given(locals(), kwargs))


class PeftModelForTokenClassification(_WithHead):
    """For classifying each token; trains `classifier` or `score` as well."""

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None,
        output_attentions: Any = None, output_hidden_states: Any = None, return_dict: Any = None,
        task_ids: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return super().forward(**_given(locals(), kwargs))


class PeftModelForQuestionAnswering(_WithHead):
    """For finding an answer's span; trains `qa_outputs` as well."""

    HEADS: ClassVar[tuple[str, ...]] = ("qa_outputs",)

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None,
        token_type_ids: Any = None, position_ids: Any = None,
        start_positions: Any = None, end_positions: Any = None, output_attentions: Any = None, output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return super().forward(**_given(locals(), kwargs))


class PeftModelForFeatureExtraction(PeftModel):
    """For embeddings."""

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None,
        output_attentions: Any = None, output_hidden_states: Any = None, return_dict: Any = None,
        task_ids: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return super().forward(**_given(locals(), kwargs))


class _Generating(PeftModel):
    """A task that writes text."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.__dict__["base_model_prepare_inputs_for_generation"] = self.base_model.prepare_inputs_for_generation

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForCausalLM(_Generating):
    """For language models."""

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None,
        output_attentions: Any = None, output_hidden_states: Any = None, return_dict: Any = None,
        task_ids: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return super().forward(**_given(locals(), kwargs))


class PeftModelForSeq2SeqLM(_Generating):
    """For encoder-decoder models."""

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None, decoder_inputs_embeds: Any = None, labels: Any = None, output_attentions: Any = None,
        output_hidden_states: Any = None, return_dict: Any = None,
        task_ids: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return super().forward(**_given(locals(), kwargs))


MODEL_TYPE_TO_PEFT_MODEL_MAPPING.update(
    {
        "SEQ_CLS": PeftModelForSequenceClassification,
        "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
        "CAUSAL_LM": PeftModelForCausalLM,
        "TOKEN_CLS": PeftModelForTokenClassification,
        "QUESTION_ANS": PeftModelForQuestionAnswering,
        "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
    }
)


def get_default_import_allowlist() -> list[str]:
    """The packages from which a base's class may come, as an adapter's file names it: a file must not choose what is imported."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether a module is one of these packages, or inside one."""
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


class _BaseAutoPeftModel:
    """Base and adapter by the adapter's name alone."""

    _target_class: Any = None
    _target_peft_class: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the `{name}.from_pretrained(pretrained_model_name_or_path)` or "
            f"`{name}.from_config(config)` methods."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base that the adapter's configuration names, with the adapter on it. A tokenizer beside it sets the vocabulary's size."""
        found = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        task = getattr(found.task_type, "value", found.task_type)
        base, target, expected = found.base_model_name_or_path, cls._target_class, cls._target_peft_class
        if target is None and task is not None:
            raise ValueError(
                "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
            )
        if task is not None:
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
            if kind.__name__ != expected.__name__:
                raise ValueError(
                    f"Expected target PEFT class: {kind.__name__}, but you have asked for: {expected.__name__} make sure that you are "
                    "loading the correct model for your task type."
                )
        elif found.auto_mapping is not None:
            place = found.auto_mapping["parent_library"]
            if not check_import_allowlist(import_allowlist or get_default_import_allowlist(), place):
                raise ValueError(
                    f"The auto mapping wants to import '{place}' which is not in the import allowlist. If you are sure that importing "
                    f"this library is safe, specify `import_allowlist=['{place}']` in `from_pretrained()`."
                )
            target = getattr(importlib.import_module(place), found.auto_mapping["base_model_class"])
        else:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct model for your task type."
            )
        if base is None:
            raise ValueError(f"the adapter in {pretrained_model_name_or_path} does not say its base (base_model_name_or_path)")
        model = target.from_pretrained(base, revision=found.revision, **kwargs)
        if (Path(pretrained_model_name_or_path) / "tokenizer_config.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, trust_remote_code=kwargs.get("trust_remote_code", False)
            )
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer))
        return expected.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name=adapter_name, is_trainable=is_trainable, config=config, **kwargs
        )


class AutoPeftModel(_BaseAutoPeftModel):
    """For an adapter whose configuration names the base's class and no task."""

    _target_peft_class = PeftModel


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """A language model with its adapter."""

    _target_class, _target_peft_class = transformers.AutoModelForCausalLM, PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """An encoder-decoder with its adapter."""

    _target_class, _target_peft_class = transformers.AutoModelForSeq2SeqLM, PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """A classifier of texts with its adapter."""

    _target_class, _target_peft_class = transformers.AutoModelForSequenceClassification, PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """A classifier of tokens with its adapter."""

    _target_class, _target_peft_class = transformers.AutoModelForTokenClassification, PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """A reader with its adapter."""

    _target_class, _target_peft_class = transformers.AutoModelForQuestionAnswering, PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """An encoder with its adapter."""

    _target_class, _target_peft_class = transformers.AutoModel, PeftModelForFeatureExtraction
