"""diffusers' LoRA files, `pytorch_lora_weights.safetensors`: one file for the parts of a pipeline, and mostly without a configuration.

| in the file, below the part's name (`unet.`, `transformer.`, `text_encoder.`) | here |
|---|---|
| `<path>.lora_A.weight`, `<path>.lora.down.weight`, `<path>.lora_linear_layer.down.weight` | A |
| `<path>.lora_B.weight`, `<path>.lora.up.weight`, `<path>.lora_linear_layer.up.weight` | B |
| `<attention>.processor.to_q_lora.down.weight` (to_k, to_v; to_out is `to_out.0`) | the A of `<attention>.to_q` |
| `<path>.alpha` | alpha; without it alpha is the rank, so that the update is BA |
| `<path>.lora_magnitude_vector` | the magnitudes of DoRA |

Newer files hold peft's configuration of each part in their header. The part is the one whose paths the model has.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from weft.adapters.formats.base import PREFIX
from weft.adapters.formats.per_expert import Fused
from weft.core import WeftError, modules

FILE, HEADER = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
_SIDES = {"lora_A": "lora_A", "lora.down": "lora_A", "lora_linear_layer.down": "lora_A", "lora_B": "lora_B", "lora.up": "lora_B",
          "lora_linear_layer.up": "lora_B"}  # fmt: skip
_ATTENTION = re.compile(r"(.*)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def file_of(folder: Path) -> Path | None:
    """The file of diffusers in a folder that holds no adapter of peft's."""
    path = folder / FILE
    return path if path.is_file() and not (folder / "adapter_config.json").exists() else None


def told(file: Any, model: nn.Module) -> tuple[dict[str, Any], Callable[[Any], Fused]]:
    """(the configuration as peft would have written it, what shows the file under peft's names) of the part that this model is.

    Raises WeftError if the file has no part that fits, or keys that no LoRA of diffusers has.
    """
    names, paths = list(file.keys()), {p for p, _ in modules(model)}
    parts: dict[str, dict[str, tuple[str, str]]] = {}  # part -> name in the file -> (path, what it is)
    strange = []
    for name in names:
        read = _read(name)
        if read is None:
            strange.append(name)
            continue
        for part in ("", name.partition(".")[0]):
            if not part or read[0].startswith(f"{part}."):
                path = read[0][len(part) + 1 :] if part else read[0]
                if path in paths:
                    parts.setdefault(part, {})[name] = (path, read[1])
    if strange:
        raise WeftError(f"{len(strange)} of {len(names)} tensors are none of a diffusers LoRA: {', '.join(strange[:3])}; "
                        "files of other trainers are converted by diffusers first (load_lora_weights, save_lora_weights)")  # fmt: skip
    if not parts:
        there = ", ".join(sorted({n.partition(".")[0] for n in names}))
        raise WeftError(f"this file of diffusers is for {there}, and this model has none of the layers named there")
    part = max(parts, key=lambda p: len(parts[p]))
    mine = parts[part]
    absent = [n for n in names if part and n.startswith(f"{part}.") and n not in mine]
    if absent:
        raise WeftError(f"{len(absent)} tensors for {part!r} belong to no layer of this model: {', '.join(absent[:3])}")
    ranks = {path: file.get_slice(n).get_shape()[0] for n, (path, what) in mine.items() if what == "lora_A.weight"}
    alphas = {path: float(file.get_tensor(n)) for n, (path, what) in mine.items() if what == "alpha"}
    config = _config(file.metadata() or {}, part) or _guessed(ranks, alphas, {what for _, what in mine.values()})
    held = {n: f"{PREFIX}{path}.{what}" for n, (path, what) in mine.items() if what != "alpha"}
    made = {ours: (tuple(file.get_slice(n).get_shape()), _getter(n)) for n, ours in held.items()}
    return config | {"target_modules": sorted(ranks)}, lambda opened: Fused(opened, made, set(names))


def _read(name: str) -> tuple[str, str] | None:
    """(path, what it is under peft's name) of one name in the file."""
    if found := _ATTENTION.fullmatch(name):
        owner, which, side = found.groups()
        return f"{owner}.to_out.0" if which == "out" else f"{owner}.to_{which}", f"{_SIDES[f'lora.{side}']}.weight"
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    if name.endswith((".lora_magnitude_vector", ".lora_magnitude_vector.weight")):
        return name.partition(".lora_magnitude_vector")[0], "lora_magnitude_vector"
    for theirs, ours in _SIDES.items():
        for end in ("weight", "bias"):
            if name.endswith(f".{theirs}.{end}"):
                return name.removesuffix(f".{theirs}.{end}"), f"{ours}.{end}"
    return None


def _config(header: dict[str, str], part: str) -> dict[str, Any] | None:
    """peft's configuration from the file's header."""
    if HEADER not in header:
        return None
    whole = json.loads(header[HEADER])
    own = {k.removeprefix(f"{part}."): v for k, v in whole.items() if k.startswith(f"{part}.")} if part else whole
    return {"peft_type": "LORA"} | own if "r" in own else None


def _guessed(ranks: dict[str, int], alphas: dict[str, float], kinds: set[str]) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    wanted = {path: alphas.get(path, float(r)) for path, r in ranks.items()}
    alpha = Counter(wanted.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "rank_pattern": {p: r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {p: a for p, a in wanted.items() if a != alpha}, "use_dora": "lora_magnitude_vector" in kinds,
        "lora_bias": "lora_B.bias" in kinds,
    }  # fmt: skip


def _getter(name: str) -> Any:
    return lambda file: file.get_tensor(name)
