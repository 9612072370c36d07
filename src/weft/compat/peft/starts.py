"""Ways for a LoRA to begin that take something out of the base, as they do in peft: PiSSA, OLoRA, LoftQ.

Everywhere else weft leaves the base's bytes alone and counts from the start (`methods/lora_start.py`). Scripts for peft look at the base
after such a start, unload it and save it, so that here its weight is changed as peft changes it: W₀ - s·B₀A₀, rounded once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from copy import copy
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters.formats.base import whole
from weft.adapters.loftq import alternate
from weft.compat.peft.kinds import PeftWarning
from weft.compat.peft.layers_lora import restart
from weft.compat.peft.state import load_peft_weights
from weft.core import base_class, features, is_conv1d, is_linear
from weft.methods.lora_linear import Factors
from weft.methods.lora_start import FROM_BASE, beginning
from weft.quant import is_quantised, roundtrip

PACKED = {4: "nf4", 8: "int8"}  # what LoftQ's bits mean
PLAIN = ("gaussian", "orthogonal")  # after these A and B alone are the whole adapter, and the method itself makes them
LATER = ("eva", "lora_ga")  # begin as LoRA does; their own functions fill in A (and B) with the data at hand


def check(config: Any, path: str, module: nn.Module, rank: int) -> None:
    """Raise what peft raises for a start that there is not, or that this layer cannot have: before anything is changed."""
    how = config.init_lora_weights
    if config.lora_bias and getattr(module, "bias", None) is None:
        warnings.warn(
            f"`lora_bias=True` was passed but the targeted layer of type {base_class(module).__name__} has no bias. Merged, it gets one.",
            PeftWarning,
            stacklevel=6,
        )
    if isinstance(how, bool):
        return
    if how.startswith("pissa") and not FROM_BASE.fullmatch(how):
        raise ValueError(f"init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', got {how} instead.")
    if not FROM_BASE.fullmatch(how.lower()) and how.lower() not in (*PLAIN, *LATER, "loftq", "mica"):
        known = "True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N', 'olora', 'loftq', 'mica', 'eva' and 'lora_ga'"
        raise ValueError(f"Unknown initialization init_lora_weights={how!r}: here there are {known}")
    if not (changes_base(how) or how == "mica") or (isinstance(module, nn.Embedding) and how != "mica"):  # an embedding begins as ever
        return
    if not is_linear(module):
        raise ValueError(f"Unknown initialization init_lora_weights={how!r} for {path}: it is for linear layers")
    if is_quantised(module) or not module.weight.is_floating_point() or module.weight.dtype.itemsize < 2:  # type: ignore[operator, union-attr]
        raise TypeError(f"{path} is packed: please initialize {how} under float32, float16, or bfloat16, and quantise afterwards.")
    if rank > min(features(module)):
        raise ValueError(f"init_lora_weights={how!r} with a rank of {rank}: {path} has no more than {min(features(module))} directions")
    if how == "loftq" and (config.loftq_config.get("loftq_bits", 4) not in PACKED or config.loftq_config.get("loftq_iter", 1) < 1):
        raise ValueError("Only nf4 and int8 quantization is supported, with at least one iteration: loftq_bits is 4 or 8, loftq_iter ≥ 1")


def changes_base(how: object) -> bool:
    """Whether such a start takes something out of the base."""
    return isinstance(how, str) and (how == "loftq" or FROM_BASE.fullmatch(how.lower()) is not None)


@torch.no_grad()
def begin(config: Any, layer: Any, adapter: Any) -> None:
    """Give a built adapter of a layer the first values that its configuration asks for, where the method's own are others."""
    how = getattr(config, "init_lora_weights", True)
    held = any(p.is_meta for p in adapter.parameters())  # values come from a file; what a start takes out of the base goes all the same
    if isinstance(adapter, Factors) and (how is False or changes_base(how)):
        if how is not False and is_linear(layer):
            _take(how, config.loftq_config, layer, adapter)
        elif how is False and not held:
            restart(adapter, False)
        if "m" in adapter._parameters and not held:  # DoRA's magnitude begins as the norm of what the layer computes
            made: Any = adapter
            made.m.copy_(made.norm(layer).view_as(made.m))
    elif isinstance(adapter, Factors) and how == "mica":
        _minor(layer, adapter)
    elif getattr(config, "init_weights", getattr(config, "init_ia3_weights", how)) is False and not held:
        for p in adapter.parameters():  # no adapter of this kind may start as the identity
            if p.requires_grad and (not p.any() or p.eq(p.flatten()[0]).all()):
                p.add_(torch.randn_like(p) * 0.1)


def _take(how: str, bits: Mapping[str, int], layer: Any, adapter: Any) -> None:
    """Fill in A and B, and take what they hold out of the base's weight."""
    if layer.weight.is_meta:
        return
    turned = is_conv1d(layer)
    W = layer.weight.float().T if turned else layer.weight.float()
    if how == "loftq":
        base = PACKED[bits.get("loftq_bits", 4)]
        left, B, A = alternate(W, adapter.A.shape[0], base, bits.get("loftq_iter", 1), exact=True)
        A, rest = A / adapter.scale, roundtrip(left, base)
    else:
        A, B = (t.to(W.device) for t in beginning(W, adapter.A.shape[0], adapter.scale, how.lower()))
        rest = W - adapter.scale * (B @ A)
    if not adapter.A.is_meta:
        adapter.A.copy_(A)
        adapter.B.copy_(B)
    layer.weight.data = (rest.T if turned else rest).to(layer.weight.dtype).contiguous()  # not in place: who holds the old one keeps it


def _minor(layer: Any, adapter: Any) -> None:
    """MiCA: B holds the left singular vectors of the base's smallest singular values and stays; A starts at zero and trains."""
    adapter.B.requires_grad_(False)
    if adapter.B.is_meta or layer.weight.is_meta:
        return
    W = layer.weight.float().T if is_conv1d(layer) else layer.weight.float()
    adapter.B.copy_(torch.linalg.svd(W, full_matrices=False)[0][:, -adapter.B.shape[1] :])
    adapter.A.zero_()


def as_plain(config: Any, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """The LoRA of twice the rank that does to the unchanged base what an adapter does to the changed one: s (BA - B₀A₀).

    Args:
        config: The adapter's. tensors: As they stand in its file.
        path: Where the adapter was saved as it began.
    Raises ValueError for another method, or if what lies there is not how this adapter began.
    """
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported for {kind}.")
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using `rank_pattern` or "
            "`alpha_pattern` at the same time as `use_rslora=True`."
        )
    if config.use_dora:
        raise ValueError("`path_initial_model_for_weight_conversion`: a DoRA's magnitudes belong to the changed base, and stay there")
    first = load_peft_weights(str(path), device="cpu")
    made: dict[str, Tensor] = {}
    for key, value in tensors.items():
        side = 0 if key.endswith(("lora_A.weight", "_embedding_A")) else 1 if key.endswith(("lora_B.weight", "_embedding_B")) else None
        if side is None:
            made[key] = value
            continue
        start = first.get(key)
        if start is None or start.shape != value.shape:
            raise ValueError(f"{path} does not hold this adapter as it began: {key} is missing there, or of another shape")
        made[key] = torch.cat((value, (-start if side else start).to(value)), side)
    more = sqrt(2) if config.use_rslora else 2
    new = copy(config)
    new.init_lora_weights, new.r, new.lora_alpha = True, 2 * config.r, whole(more * config.lora_alpha)
    new.rank_pattern = {k: 2 * r for k, r in (config.rank_pattern or {}).items()}
    new.alpha_pattern = {k: more * a for k, a in (config.alpha_pattern or {}).items()}
    return new, made
