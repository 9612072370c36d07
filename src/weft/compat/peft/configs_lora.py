"""The configurations of LoRA and AdaLoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from weft.compat.peft.config import PeftConfig
from weft.compat.peft.kinds import PeftType


@dataclass
class LoraRuntimeConfig:
    """Settings that are never saved."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ: bits of the quantised base, and alternating steps."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """EVA: rank budget, and how activations are gathered."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError("`rho` must be >= 1.0")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError("`tau` must be between 0.0 and 1.0.")


@dataclass
class CordaConfig:
    """CorDA: which of its two modes, and where covariances are kept."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """LoRA-GA: which singular vectors of the gradient, and their scale."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class ArrowConfig:
    """Arrow: routing between LoRA adapters."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        if self.top_k <= 0:
            raise ValueError("top_k cannot be negative.")
        if self.router_temperature <= 0:
            raise ValueError("router_temperature must be greater than 0.")


_PARTS = {"eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig, "arrow_config": ArrowConfig}


@dataclass
class LoraConfig(PeftConfig):
    """LoRA's settings under peft's names. `docs/peft.md` says what weft does with each."""

    KIND: ClassVar[PeftType] = PeftType.LORA
    _whole_pattern: ClassVar[bool] = True

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: ArrowConfig | None = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("runtime_config")
        return values

    def __post_init__(self) -> None:
        super().__post_init__()
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] | None = None
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                late = {f: value.pop(f) for f in ("task_adapter_names", "gks_adapter_names") if f in (value := dict(value))}
                made = kind(**value)
                for key, given in late.items():
                    setattr(made, key, given)
                setattr(self, name, made)
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        self._check_start()
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={self.init_lora_weights} instead."
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", stacklevel=3)

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if start == "loftq":
            if not self.loftq_config:
                raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
            if not isinstance(self.loftq_config, dict):
                self.loftq_config = vars(self.loftq_config)
        elif self.loftq_config:
            self.loftq_config = {}
            warnings.warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.", stacklevel=4)
        for name, shown, kind in (("eva", "EVA", EvaConfig), ("corda", "CorDA", CordaConfig)):
            given = getattr(self, f"{name}_config")
            if start == name and given is None:
                setattr(self, f"{name}_config", kind())
                text = f"`init_lora_weights` is '{name}' but `{name}_config` is not specified. Using default {shown} config."
                warnings.warn(text, stacklevel=4)
            elif start != name and given is not None:
                warnings.warn(f"`{name}_config` specified but will be ignored when `init_lora_weights` is not '{name}'.", stacklevel=4)
        moved = isinstance(start, str) and (start.startswith("pissa") or start in ("olora", "corda", "lora_ga"))
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and moved:
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified base weights "
                "PiSSA/CorDA/OLoRA/LoRA-GA means that you won't be able to pass `path_initial_model_for_weight_conversion` to "
                "`save_pretrained`.",
                stacklevel=4,
            )

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        raise ValueError(
            "weft adapts a layer from outside and takes no layer class of yours: write a weft.Method "
            "(CONTRIBUTING, 'A new method in one file')"
        )


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA's settings under peft's names."""

    KIND: ClassVar[PeftType] = PeftType.ADALORA

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora:
            raise ValueError(f"{self.peft_type} does not support DoRA.")
        if self.loftq_config:
            raise ValueError(f"{self.peft_type} does not support LOFTQ.")
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored."
                "If you intended to set the initial rank, use `init_r` instead.",
                stacklevel=3,
            )
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.orth_reg_weight < 0:
            raise ValueError(f"`orth_reg_weight` should be greater than or equal to 0, but the value passed is {self.orth_reg_weight}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase `total_step`."
            )
