"""What all of peft's configurations share: fields, JSON, loading of older and newer files."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import hf_hub_download
from transformers.utils import PushToHubMixin

from weft.compat.peft.kinds import PeftType, TaskType

VERSION = "0.21.2"  # of the peft whose documentation this face keeps
CONFIG_NAME = "adapter_config.json"
DOWNLOAD = frozenset(inspect.signature(hf_hub_download).parameters)
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {}


@dataclass
class PeftConfigMixin(PushToHubMixin):
    """Fields and files of every configuration."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = ", ".join(t.value for t in TaskType)
            raise ValueError(f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {known}.")
        if self.peft_version is None:
            self.peft_version = VERSION

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method acts on the model's input and not on its layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether this is LLaMA-Adapter, which weft does not have."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested configurations as dictionaries."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json into a folder, which is made if missing."""
        folder = Path(save_directory)
        if folder.is_file():
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        folder.mkdir(parents=True, exist_ok=True)
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in self.to_dict().items()}
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """The configuration of the class that `peft_type` names. Fields that it does not have are named in a warning and left out."""
        kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kwargs["peft_type"]] if "peft_type" in kwargs else cls
        known = set(inspect.signature(kind.__init__).parameters)
        unknown = sorted(set(kwargs) - known)
        if not unknown:
            return kind(**kwargs)
        if "peft_type" not in kwargs:
            raise TypeError(f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}.")
        warnings.warn(
            f"Unexpected keyword arguments {unknown} for class {kind.__name__}, these are ignored. The file was probably written "
            "by a higher version of peft; what these fields stand for is not computed here.",
            stacklevel=3,
        )
        return kind(**{k: v for k, v in kwargs.items() if k in known})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read adapter_config.json from a folder or, where that is none, from the hub. Raises ValueError if there is none."""
        download, own, _ = cls._split_kwargs(kwargs)
        found = cls.from_json_file(config_file(pretrained_model_name_or_path, subfolder, **download))
        return cls.from_peft_type(**cls.check_kwargs(**(own | found)))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields in a file."""
        values: dict[str, Any] = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        if "runtime_config" in values:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. "
                "Runtime configurations are only valid at runtime.",
                stacklevel=3,
            )
            del values["runtime_config"]
        return values

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        download = {k: v for k, v in kwargs.items() if k in DOWNLOAD}
        own = {k: v for k, v in kwargs.items() if k not in DOWNLOAD and k in cls.__annotations__}
        return download, own, {k: v for k, v in kwargs.items() if k not in download and k not in own}

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike[str], **kwargs: Any) -> str:
        kwargs.pop("use_auth_token", None)
        return str(cls.from_json_file(config_file(model_id, kwargs.pop("subfolder", None), **kwargs))["peft_type"])

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """A place for a subclass to refuse fields before it is made."""
        return kwargs


def config_file(source: str | os.PathLike[str], subfolder: str | None, **download: Any) -> str:
    """The path of an adapter's configuration, downloaded if `source` is no folder. Raises ValueError if it cannot be found."""
    here = Path(source, subfolder or "") / CONFIG_NAME
    if here.is_file():
        return str(here)
    try:
        return str(hf_hub_download(str(source), CONFIG_NAME, subfolder=subfolder, **{k: v for k, v in download.items() if v is not None}))
    except Exception as e:
        raise ValueError(f"Can't find '{CONFIG_NAME}' at '{source}'") from e


@dataclass
class PeftConfig(PeftConfigMixin):
    """The fields that every method's configuration begins with."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    KIND: ClassVar[PeftType | None] = None  # a subclass says which method it configures, and is found by it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("KIND") is not None:
            PEFT_TYPE_TO_CONFIG_MAPPING[cls.KIND] = cls  # type: ignore[index]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.KIND is not None:
            self.peft_type = self.KIND
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(getattr(self, name, None), list):
                setattr(self, name, set(getattr(self, name)))
        pattern, layers = getattr(self, "layers_pattern", None), getattr(self, "layers_to_transform", None)
        if self._whole_pattern and isinstance(getattr(self, "target_modules", None), str):
            for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
                if value is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if pattern and layers is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    _whole_pattern: ClassVar[bool] = False  # whether a regular expression as target refuses a choice of layers beside it


@dataclass
class PromptLearningConfig(PeftConfig):
    """Fields of methods that put virtual tokens before the input. What is None is read off the model."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True


def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """The configuration that a dictionary with `peft_type` describes."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)


@contextmanager
def listed(configs: dict[str, Any], name: str, config: Any) -> Iterator[None]:
    """An adapter's entry, which goes again if what makes the adapter is broken off, by Ctrl-C too: its name is free then."""
    configs[name] = config
    try:
        yield
    except BaseException:
        configs.pop(name, None)
        raise
