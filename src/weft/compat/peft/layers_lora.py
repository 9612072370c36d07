"""The fronts of LoRA and AdaLoRA."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.compat.peft.layers import BaseTunerLayer
from weft.compat.peft.views import Live
from weft.core import Adapter, is_linear
from weft.methods.alora import Activated
from weft.methods.lora_linear import Factors


class LoraLayer(BaseTunerLayer):
    """A layer with LoRA adapters."""

    FAMILY: ClassVar[str] = "lora"
    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names: tuple[str, ...] = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    ephemeral_gpu_offload = False
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = {
        "lora_dropout": nn.ModuleDict, "lora_A": nn.ModuleDict, "lora_B": nn.ModuleDict, "lora_embedding_A": nn.ParameterDict,
        "lora_embedding_B": nn.ParameterDict, "lora_magnitude_vector": nn.ModuleDict,
    }  # fmt: skip

    def __init__(self, base_layer: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.lora_variant: dict[str, Any] = {}  # peft's classes for DoRA and its like; here the adapter itself is of another class

    @property
    def scaling(self) -> Live:
        """By adapter, what its update is multiplied by; writing here changes the adapter."""
        return Live(self.slot, "scale", self.names)

    @property
    def r(self) -> Live:
        """By adapter, its rank."""
        return Live(self.slot, "rank", self.names)

    def _added(self, name: str, adapter: Adapter, config: Any) -> None:
        self.use_rslora[name], self.use_dora[name] = bool(config.use_rslora), bool(config.use_dora)
        self.lora_bias[name] = bool(config.lora_bias)
        rank = self.r[name]
        alpha = self.scaling[name] * (sqrt(rank) if config.use_rslora else rank)
        self.lora_alpha[name] = round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()

    def scale_of(self, name: str) -> float:
        """The scale that alpha and rank give."""
        rank = self.r[name]
        return self.lora_alpha[name] / (sqrt(rank) if self.use_rslora.get(name) else rank)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter's update by this factor over its own."""
        if adapter in self.trains:
            self.scaling[adapter] = scale * self.scale_of(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the adapters that work."""
        for name in self.active_adapters if scale != 1 else ():
            if name in self.trains:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`: divide, or without a number go back to alpha / r."""
        for name in self.active_adapters:
            if name in self.trains:
                self.scaling[name] = self.scale_of(name) if scale is None else self.scaling[name] / scale

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Start an adapter afresh: True as LoRA does, "gaussian", or False for random factors on both sides."""
        if init_lora_weights == "never":
            return
        restart(self.slot[adapter_name], init_lora_weights)

    def get_delta_weight(self, adapter: str) -> Tensor:
        made: Any = self.slot[adapter]
        if is_linear(self.get_base_layer()) and not self.use_dora.get(adapter) and hasattr(made, "B") and made.B.dim() == 2:
            A, B = made.product() if isinstance(made, Factors) else (made.A, made.B)
            delta = (B @ A) * made.scale
            return delta.T if self.fan_in_fan_out else delta
        return super().get_delta_weight(adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the weights, but for activated ones: peft's NotImplementedError."""
        given = self.active_adapters if adapter_names is None else adapter_names
        if any(n in self.trains and isinstance(self.slot[n], Activated) for n in given):
            raise NotImplementedError(f"aLoRA does not support {'safe ' if safe_merge else ''}merging.")
        super().merge(safe_merge, adapter_names)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not (adapter_name in self.trains and isinstance(self.slot[adapter_name], Activated))


class Linear(LoraLayer):
    """LoRA on nn.Linear or transformers' Conv1D."""


class Embedding(LoraLayer):
    """LoRA on an embedding."""


class Conv1d(LoraLayer):
    """LoRA on a convolution."""


class Conv2d(LoraLayer):
    """LoRA on a convolution."""


class Conv3d(LoraLayer):
    """LoRA on a convolution."""


class MultiheadAttention(LoraLayer):
    """A name that scripts import; nn.MultiheadAttention calls none of its layers, so weft refuses it as a target."""


class AdaLoraLayer(LoraLayer):
    """A layer with AdaLoRA adapters."""

    FAMILY: ClassVar[str] = "adalora"
    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names: tuple[str, ...] = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")
    CONTAINERS: ClassVar[Mapping[str, type[nn.Module]]] = {
        "lora_dropout": nn.ModuleDict, "lora_A": nn.ParameterDict, "lora_B": nn.ParameterDict, "lora_E": nn.ParameterDict,
        "ranknum": nn.ParameterDict,
    }  # fmt: skip

    def _added(self, name: str, adapter: Adapter, config: Any) -> None:
        self.lora_alpha[name] = config.lora_alpha
        method: Any = adapter.method  # peft's ranknum is the rank at the start, by which the scale goes; nothing here reads it
        self.ranknum[name] = nn.Parameter(torch.tensor([float(method.rank if self.r[name] else 0)]), requires_grad=False)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()

    def get_delta_weight(self, adapter: str) -> Tensor:
        return BaseTunerLayer.get_delta_weight(self, adapter)


class SVDLinear(AdaLoraLayer):
    """AdaLoRA on a linear layer."""


def restart(adapter: Any, how: bool | str) -> None:
    """Give the factors of a LoRA adapter their first values again."""
    A, B = adapter.A, adapter.B
    flat = isinstance(A, nn.Parameter) and A.is_meta
    if flat:
        return
    with torch.no_grad():
        if type(adapter).__name__.endswith("Embedding"):
            nn.init.zeros_(A) if how is not False else nn.init.normal_(A)
            nn.init.normal_(B)
            return
        if how == "gaussian":
            nn.init.normal_(A, std=1 / A.shape[0])
        else:
            nn.init.kaiming_uniform_(A, a=sqrt(5))
        if how is False:
            nn.init.kaiming_uniform_(B, a=sqrt(5))
        else:
            nn.init.zeros_(B)


def resize(front: BaseTunerLayer, name: str, rank: int, alpha: float, config: Any) -> Any:
    """Give one layer's factors another rank and alpha: new tensors, as after a load without memory, unless they fit. The adapter."""
    adapter: Any = front.slot[name]
    adapter.scale = alpha / (sqrt(rank) if config.use_rslora else rank)
    base: Any = front.get_base_layer()
    place = base.weight.device
    for key, dim in (("A", 0), ("B", 1)):
        old = adapter._parameters[key]
        if old.is_meta or old.shape[dim] != rank:
            shape = [rank if i == dim else size for i, size in enumerate(old.shape)]
            adapter._parameters[key] = nn.Parameter(torch.zeros(shape, dtype=old.dtype, device=place), requires_grad=old.requires_grad)
    front.add(name, adapter, config)
    return adapter


def dispatch(base: Any) -> type[LoraLayer]:
    """The front for a layer."""
    if isinstance(base, nn.Embedding):
        return Embedding
    for kind, front in ((nn.Conv1d, Conv1d), (nn.Conv2d, Conv2d), (nn.Conv3d, Conv3d)):
        if isinstance(base, kind):
            return front
    return Linear


def mend_fan_in_fan_out(config: Any, base: Any, conv1d: bool) -> None:
    """The two warnings of peft about `fan_in_fan_out`, which weft reads off the layer."""
    if conv1d and not config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True.", stacklevel=4)
        config.fan_in_fan_out = True
    elif isinstance(base, nn.Linear) and config.fan_in_fan_out:
        warnings.warn(
            "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to False.", stacklevel=4
        )
        config.fan_in_fan_out = False
