"""The configurations of the methods beside LoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal

from weft.compat.peft.config import PeftConfig, PromptLearningConfig
from weft.compat.peft.kinds import PeftType


@dataclass
class IA3Config(PeftConfig):
    """(IA)³ under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.IA3

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        inner, targets = self.feedforward_modules, self.target_modules
        if isinstance(inner, set) and isinstance(targets, set) and not inner <= targets:
            raise ValueError("`feedforward_modules` should be a subset of `target_modules`")


@dataclass
class LycorisConfig(PeftConfig):
    """What LoHa and LoKr share."""

    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)


@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.LOHA

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None


@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.LOKR

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool | Literal["lycoris"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None


@dataclass
class OFTConfig(PeftConfig):
    """OFT under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.OFT

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r == 0 and self.oft_block_size == 0:
            raise ValueError(
                f"Either `r` or `oft_block_size` must be non-zero. Currently, r = {self.r} and oft_block_size = {self.oft_block_size}."
            )
        if self.r != 0 and self.oft_block_size != 0:
            raise ValueError(
                f"You can only specify either r ({self.r}) or oft_block_size ({self.oft_block_size}), but not both simultaneously, "
                "because r x oft_block_size == in_features."
            )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        if "oft_block_size" not in kwargs:
            raise ValueError(
                "OFT has been updated since PEFT 0.14.0. Your trained adapter weights are incompatible with the latest version of OFT. "
                "Please retrain your adapter weights with newer PEFT versions."
            )
        return super().check_kwargs(**kwargs)


@dataclass
class VeraConfig(PeftConfig):
    """VeRA under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.VERA

    r: int = 256
    target_modules: list[str] | set[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save_projection:
            warnings.warn(
                "Specified to not save vera_A and vera_B within the state dictionary, instead they will be restored using the PRNG key "
                "store in `config.projection_prng_key`. Consider setting `config.save_projection` to `True` to guarantee restoring the "
                "checkpoint correctly on all system configurations.",
                stacklevel=3,
            )


@dataclass
class LNTuningConfig(PeftConfig):
    """LayerNorm tuning under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.LN_TUNING

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | str | None = None

    def __post_init__(self) -> None:
        targets, excluded = self.target_modules, self.exclude_modules
        super().__post_init__()
        self.target_modules, self.exclude_modules = targets, excluded  # this one keeps its lists


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Trainable tokens under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.TRAINABLE_TOKENS

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | set[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        targets = self.target_modules
        super().__post_init__()
        self.target_modules = targets


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.PREFIX_TUNING

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


class PromptTuningInit(str, Enum):  # noqa: UP042 (as in peft, its text is its name)
    """How the virtual tokens of prompt tuning begin."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.PROMPT_TUNING

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if text and not self.tokenizer_name_or_path:
            raise ValueError(f"When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be {self.tokenizer_name_or_path}.")
        if text and self.prompt_tuning_init_text is None:
            raise ValueError(f"When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be {self.prompt_tuning_init_text}.")
        if self.tokenizer_kwargs and not text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


class PromptEncoderReparameterizationType(str, Enum):  # noqa: UP042
    """The network that makes the virtual tokens of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.P_TUNING

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
