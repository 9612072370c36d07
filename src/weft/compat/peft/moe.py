"""Mixtures of experts as transformers 5 builds them: what was a linear layer for each expert is one parameter for all.

Configurations that name the old layers ("w1", "gate_proj") come to mean the parameters that hold them now, and files that were saved for
the old layers are read into those, as in peft.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping

from weft.compat.peft.kinds import PeftType
from weft.compat.peft.targets import SHORTHAND, check_target_module_exists, include_all_linear

# a family: the layers that there were, and the parameter that each is now; where several went into one they lie in this order
FUSED: dict[str, dict[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"},
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.lora_([AB])\.weight")


def family(model: Any) -> dict[str, str] | None:
    """The table for a model; None if its layers are what they were."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or get_checkpoint_conversion_mapping(kind) is None:
        return None
    return FUSED.get("mixtral" if kind == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(kind, ""))


def fuse_config(config: Any, model: nn.Module, everything: Mapping[str, nn.Module]) -> None:
    """Let a LoRA configuration mean the parameters that its layers became, with as many times the rank and alpha as went into one.

    Raises ValueError if only some of the layers that went into one parameter are named.
    """
    table = family(model) if config.peft_type == PeftType.LORA else None
    if table is None:
        return
    if isinstance(config.target_modules, str):
        names = _names(config, model, everything, table)
        if not names:
            return
        config.target_modules = names
    old = {t: next((o for o in table if t == o or t.endswith(f".{o}")), None) for t in config.target_modules or ()}
    config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    config.target_parameters = set(config.target_parameters or ()) | {table[o] for o in old.values() if o}
    config.target_modules = {t for t, o in old.items() if o is None}
    for new in dict.fromkeys(table.values()):
        parts = [o for o, n in table.items() if n == new]
        have = [o for o in parts if o in old.values()]
        if have and have != parts:
            raise ValueError(
                f"Cannot convert PEFT target(s) {', '.join(have)} without also targeting {', '.join(sorted(set(parts) - set(have)))} "
                f"because they are fused into {new}."
            )
        if len(have) > 1:
            config.rank_pattern[rf".*\.{new}"] = config.r * len(have)
            config.alpha_pattern[rf".*\.{new}"] = config.lora_alpha * len(have)


def _names(config: Any, model: nn.Module, everything: Mapping[str, nn.Module], table: Mapping[str, str]) -> set[str]:
    """The last names of what a regular expression or "all-linear" means, among the layers that there were too."""
    if config.target_modules.lower() == SHORTHAND:
        plain = copy(config)
        include_all_linear(plain, model, dict(everything))
        return {name.rpartition(".")[2] for name in plain.target_modules} | set(table)
    owned = [f"{p}.{n}" for p, m in everything.items() for n, v in m._parameters.items() if v is not None]
    found = {k.rpartition(".")[2] for k in chain(everything, owned) if check_target_module_exists(config, k)}
    for old, new in table.items():
        homes = {k.rpartition(".")[0] for k in owned if k.rpartition(".")[2] == new}
        if any(check_target_module_exists(config, f"{home}.{old}") for home in homes):
            found.add(old)
    return found


def fuse_state(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, with those of single experts put together as the fused parameters have them.

    A of all experts (experts · rank, in) one after another, B (out, rank · experts) with the expert as its fastest index; of two layers
    that went into one, the ranks stand side by side and each writes its own half of the outputs.
    """
    table = family(model)
    if table is None or not any(_EXPERT.fullmatch(k) for k in tensors):
        return dict(tensors)
    made: dict[str, Tensor] = {}
    experts: dict[str, dict[str, dict[str, dict[int, Tensor]]]] = {}
    for key, value in tensors.items():
        found = _EXPERT.fullmatch(key)
        if found is None:
            made[key.replace(".block_sparse_moe.", ".mlp.")] = value
        else:
            home = found[1].replace(".block_sparse_moe.", ".mlp.")
            experts.setdefault(home, {}).setdefault(found[3], {}).setdefault(found[4], {})[int(found[2])] = value
    for home, layers in experts.items():
        parameters = [new for new in dict.fromkeys(table.values()) if any(table[o] == new for o in layers)]
        for i, new in enumerate(reversed(parameters)):  # the last one stands outermost
            parts = [layers[o] for o in table if table[o] == new and o in layers]
            numbers = sorted(parts[0]["A"])
            A = [torch.cat([part["A"][e] for part in parts]) for e in numbers]
            B = [torch.block_diag(*(part["B"][e] for part in parts)) for e in numbers]
            at = f"{home}.{'base_layer.' * i}lora_"
            made |= {f"{at}A.weight": torch.cat(A), f"{at}B.weight": torch.stack(B, 2).flatten(1)}
    return made
