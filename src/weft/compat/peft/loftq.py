"""LoftQ on a base that is packed already (`LoraConfig(init_lora_weights="loftq")` packs and unpacks by itself: see starts.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from weft.compat.peft.kinds import as_value_error
from weft.compat.peft.layers_lora import LoraLayer
from weft.core import is_conv1d, is_linear
from weft.models.shards import Shards
from weft.quant import dense, is_quantised


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Let an adapter on a packed base (`weft.load_base(..., base="nf4")`) start as the best part of what packing lost: s·BA ≈ W - Ŵ.

    The weights as numbers are read one at a time from the model's safetensors, sharded or not.

    Args:
        model_path: The folder or the file; None: the model's own, from its folder or from the hub's cache.
        callback: (model, path of a layer) after each layer; if it says False, that layer gets its old factors back.
    Raises:
        ValueError: no file, no packed layer with this adapter, or one whose weight is not in the file.
    """
    inner = peft_model.get_base_model()
    with as_value_error():
        shards = Shards(_folder(inner, model_path))
    found = {
        name.removeprefix("base_model.model."): front
        for name, front in peft_model.named_modules()
        if isinstance(front, LoraLayer)
        and adapter_name in front.trains
        and is_quantised(front.get_base_layer())
        and is_linear(front.behind)
    }
    if not found:
        raise ValueError("No bnb LoRA module found on the model: no packed linear layer here has this adapter")
    prefix = f"{getattr(inner, 'base_model_prefix', '')}."
    for path, front in found.items():
        key = f"{path}.weight"
        key = key if key in shards else key.removeprefix(prefix)
        if key not in shards:
            raise ValueError(f"{path}.weight is not in the checkpoint: is this the model that was packed?")
        layer: Any = front.get_base_layer()
        adapter: Any = front.slot[adapter_name]
        with as_value_error():
            W = shards.read(key)
        lost = W.to(adapter.A.device, torch.float32) - dense(layer).float()
        before = adapter.A.clone(), adapter.B.clone()
        A, B = best(lost.T if is_conv1d(layer) else lost, adapter.A.shape[0])
        adapter.A.copy_(A / adapter.scale)
        adapter.B.copy_(B)
        if callback is not None and not callback(peft_model, path):
            adapter.A.copy_(before[0])
            adapter.B.copy_(before[1])


def best(lost: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is nearest to a matrix."""
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def _folder(model: Any, given: str | os.PathLike[str] | None) -> Path:
    if given is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        try:
            given = name if name and Path(name).is_dir() else snapshot_download(name, local_files_only=True)
        except (HFValidationError, LocalEntryNotFoundError) as e:
            raise ValueError(
                "The model.safetensors file must be present on disk, but it could not be found. Pass model_path, the folder or the file."
            ) from e
    path = Path(given)
    folder = path.parent if path.suffix == ".safetensors" else path
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"Could not find file for {path}, ensure that there is a (sharded) safetensors file of the model.")
    return folder
