"""What each adapted layer, and the model as a whole, is doing now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from weft.compat.peft.layers import BaseTunerLayer
from weft.compat.peft.tokens import TrainableTokensWrapper
from weft.compat.peft.tuner import BaseTuner, shown_name
from weft.compat.peft.wrappers import AuxiliaryTrainingWrapper

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapted layers of a model."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def _agreed(values: Iterable[Any]) -> Any:
    seen = list(values)
    return seen[0] if seen and all(v == seen[0] for v in seen) else "irregular"


def _tensors(module: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name in module.adapter_layer_names:
        container = getattr(module, name, None)
        if isinstance(container, nn.ModuleDict):
            for key, part in container.items():
                found.setdefault(key, []).extend(part.parameters())
        elif isinstance(container, nn.ParameterDict):
            for key, p in container.items():
                found.setdefault(key, []).append(p)
    return found


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted layer. Raises TypeError for a method that adapts no layer."""
    inner: nn.Module = model
    if hasattr(model, "peft_type") and hasattr(model, "base_model") and hasattr(model, "get_base_model"):
        inner = model.base_model
        if not isinstance(inner, BaseTuner):
            raise TypeError("get_layer_status() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported.")
    found = []
    for name, module in inner.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or isinstance(module, TrainableTokensWrapper):
            continue
        tensors = _tensors(module)
        devices = {k: sorted({p.device.type for p in ps}) for k, ps in tensors.items()}
        if isinstance(module, BaseTunerLayer) and any(k not in devices for k in module.names):
            devices |= {k: sorted({p.device.type for p in module.slot[k].parameters()}) for k in module.names if k not in devices}
        found.append(
            TunerLayerStatus(
                name=name,
                module_type=repr(module).partition("(")[0],
                enabled=not module.disable_adapters,
                active_adapters=list(module.active_adapters),
                merged_adapters=list(module.merged_adapters),
                requires_grad={k: _agreed(p.requires_grad for p in ps) for k, ps in tensors.items()},
                available_adapters=sorted(module.names if isinstance(module, BaseTunerLayer) else module._adapters),
                devices=devices,
                quantization_backend=None,
            )
        )
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters injected in the "
            "model."
        )
    return found


def get_model_status(model: Any) -> TunerModelStatus:
    """The state of all adapted layers together; "irregular" where they do not agree."""
    layers = get_layer_status(model)
    inner = getattr(model, "base_model", None)
    wrapped = isinstance(inner, BaseTuner)
    configs: Mapping[str, Any] = inner.peft_config if wrapped and inner is not None else {}
    merged = sorted({n for s in layers for n in s.merged_adapters})
    mixed = any((set(s.available_adapters) - set(s.merged_adapters)) & set(merged) for s in layers)
    flags: dict[str, list[Any]] = {}
    devices: dict[str, set[str]] = {}
    for s in layers:
        for key, flag in s.requires_grad.items():
            flags.setdefault(key, []).append(flag)
        for key, where in s.devices.items():
            devices.setdefault(key, set()).update(where)
    trainable, total = count(model)
    plain = shown_name(model) if isinstance(model, PreTrainedModel) else "other"
    return TunerModelStatus(
        base_model_type=shown_name(model.get_base_model()) if wrapped else plain,
        adapter_model_type=type(inner).__name__ if wrapped else "None",
        peft_types={k: str(getattr(c.peft_type, "value", c.peft_type)) for k, c in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(s.enabled for s in layers),
        active_adapters=_agreed(s.active_adapters for s in layers),
        merged_adapters="irregular" if mixed else merged,
        requires_grad={k: _agreed(v) for k, v in flags.items()},
        available_adapters=sorted({n for s in layers for n in s.available_adapters}),
        devices={k: sorted(v) for k, v in devices.items()},
        quantization_backend=_agreed(s.quantization_backend for s in layers),
    )


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a tied one counts once."""
    everything = [p for _, p in model.named_parameters()]
    return sum(p.numel() for p in everything if p.requires_grad), sum(p.numel() for p in everything)
