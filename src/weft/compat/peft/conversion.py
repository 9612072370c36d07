"""A LoRA that stands for an adapter of another method (`weft.convert` under peft's names)."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from weft.adapters.convert import approximate, holdable, matrix
from weft.adapters.files import write_atomically
from weft.compat.peft.configs_lora import LoraConfig
from weft.compat.peft.kinds import PeftType
from weft.compat.peft.layers import BaseTunerLayer
from weft.compat.peft.state import SAFETENSORS_WEIGHTS_NAME
from weft.compat.peft.wrappers import ModulesToSaveWrapper


def convert_to_lora(
    model: Any, rank: float, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: Any = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of the best LoRA for an adapter that adds to the weights.

    Args:
        rank: A whole number for all layers; or the share of each layer's ‖ΔW‖² to keep, above 0 and at most 1.
        progressbar, compile_kwargs: Taken for peft's sake.
    Raises:
        TypeError: no layer, or one whose method is no sum. ValueError: a rank that makes no sense.
    """
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}.")
    if rank == 0:
        raise ValueError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    found = {p: m for p, m in model.named_modules() if isinstance(m, BaseTunerLayer) and adapter_name in m.trains}
    refused = {repr(type(m)) for m in found.values() if not m.supports_lora_conversion(adapter_name)}
    if refused:
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {', '.join(sorted(refused))}.")
    if not found:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    before = getattr(model, "peft_config", {}).get(adapter_name)
    if before is not None and before.peft_type == PeftType.LORA:
        text = "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that."
        warnings.warn(text, stacklevel=2)
    if getattr(before, "bias", "none") != "none":
        raise ValueError(f"The adapter's config sets bias={before.bias}, this is not supported right now.")
    whole = rank if isinstance(rank, int) else 1
    origin = getattr(before, "base_model_name_or_path", None)
    config = LoraConfig(r=whole, lora_alpha=whole, target_modules=[], base_model_name_or_path=origin)
    config.task_type = getattr(before, "task_type", None)
    state: dict[str, Tensor] = {}
    for path, front in found.items():
        tensors = _factors(front, adapter_name, rank, path)
        name = path.removeprefix("base_model.model.")
        if tensors is None:
            continue
        config.target_modules.add(name)  # type: ignore[union-attr]
        A, B = tensors
        if len(A) != whole:
            config.rank_pattern[name], config.alpha_pattern[name] = len(A), len(A)  # type: ignore[index]
        state |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    if getattr(before, "modules_to_save", None):
        config.modules_to_save = copy.copy(before.modules_to_save)
        for path, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                state |= {f"{path}.{k}": v for k, v in module.modules_to_save[adapter_name].state_dict().items()}
    return config, state


def _factors(front: BaseTunerLayer, name: str, rank: float, path: str) -> tuple[Tensor, Tensor] | None:
    layer: nn.Module = front.get_base_layer()
    if not holdable(layer) or isinstance(layer, nn.Embedding):
        raise TypeError(f"{path}: only linear layers and convolutions without groups can be converted")
    with torch.no_grad():
        change = front.get_delta_weight(name).float()
        if not change.any():
            return None
        wanted = matrix(change, layer)
        if isinstance(rank, int) and rank > min(wanted.shape[1:]):
            raise ValueError(f"{path}: a rank of {rank} is more than its weight of shape {tuple(wanted.shape[1:])} can have")
        made, _ = approximate(wanted, rank if isinstance(rank, int) else None, None if isinstance(rank, int) else rank, path)
        A, B = made.A[0], made.B[0]
        if change.dim() > 2:  # a convolution's kernel goes with A
            A, B = A.view(len(A), *change.shape[1:]), B.view(*B.shape, *(1 for _ in change.shape[2:]))
    return A.contiguous(), B.contiguous()


def save_as_lora(
    path: str | os.PathLike[str],
    model: Any,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """Write what `convert_to_lora` gives as an adapter of its own."""
    config, state = convert_to_lora(model, rank, adapter_name)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically({folder / SAFETENSORS_WEIGHTS_NAME: to_bytes({k: v.cpu() for k, v in state.items()}, metadata={"format": "pt"})})
    config.save_pretrained(folder)
