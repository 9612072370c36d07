"""What peft offers on any model with adapters, wrapped or not (`peft.functional`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from weft.compat.peft.layers import BaseTunerLayer, cast_adapter, framework
from weft.compat.peft.wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, choose_whole


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> None:
    """Choose the adapters that work, and that train unless it is for inference."""
    choose_whole(model, adapter_name, inference_mode)
    for _, module in list(framework(model)):
        if isinstance(module, layer_cls):
            if module.merged:
                warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=4)
                module.unmerge()
            module.set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters train or not."""
    for _, module in list(framework(model)):
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            module.set_requires_grad(adapter_names, requires_grad)


def enable(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off."""
    for _, module in list(framework(model)):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(enabled)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> list[str] | None:
    """Take an adapter off every layer; the adapters that work now, or None if no layer has one."""
    rest: list[str] | None = None
    for _, module in list(framework(model)):
        if isinstance(module, layer_cls):
            module.delete_adapter(adapter_name)
            rest = list(module.active_adapters) if rest is None else rest
    for _, module in list(framework(model)):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, new_active_adapters=rest)
    return rest


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """16-bit adapters become fp32, unless `autocast_adapter_dtype` is off."""
    for _, module in list(framework(model)):
        if autocast_adapter_dtype and isinstance(module, BaseTunerLayer) and adapter_name in module.trains:
            cast_adapter(module.slot[adapter_name], module.get_base_layer(), True)
