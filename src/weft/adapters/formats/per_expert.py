"""LoRA files from before transformers 5, where each expert was a module with linear layers of its own, for models whose experts are fused.

| in the file, below `...experts.<e>` | the parameter now | its rows |
|---|---|---|
| w1 or gate_proj | gate_up_proj | the first half |
| w3 or up_proj | gate_up_proj (up_proj, where there is no gate) | the second half (all) |
| w2 or down_proj | down_proj | all |

Gate and up had factors of their own. Stacked they are factors of the one parameter, of both ranks together: A = [A₁; A₃], B = diag(B₁, B₃).
Modules that have been renamed since (`block_sparse_moe`, now `mlp`) are found too, and routers, which were linear layers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters.formats.base import PREFIX
from weft.core import WeftError, is_linear, logical, matcher, modules, several
from weft.methods import LoRA

_PARTS = {
    "w1": ("gate_up_proj", 0), "gate_proj": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0), "down_proj": ("down_proj", 0),
}  # fmt: skip
_RENAMED = (("block_sparse_moe", "mlp"),)
Made = Mapping[str, tuple[tuple[int, ...], Callable[[Any], Tensor]]]  # a name -> the shape, and how to make the tensor from a file
Where = tuple[str, str]  # the path of a module, and a parameter of it


@dataclass
class Factors:
    """What a file has for one linear layer of one expert."""

    A: str
    B: str
    rank: int
    scale: float


class Fused:
    """A file as it would be if it had been written for fused experts.

    Args:
        made: What stands under another name or in another form in the file.
        gone: The names in the file that these stand for.
    """

    def __init__(self, file: Any, made: Made, gone: set[str]) -> None:
        self.file, self.made, self.gone = file, made, gone

    def keys(self) -> list[str]:
        return [k for k in self.file.keys() if k not in self.gone] + list(self.made)  # noqa: SIM118 (a safetensors file is no mapping)

    def metadata(self) -> Any:
        return self.file.metadata()

    def get_slice(self, name: str) -> Any:
        return Shape(self.made[name][0]) if name in self.made else self.file.get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        found: Tensor = self.made[name][1](self.file) if name in self.made else self.file.get_tensor(name)
        return found


@dataclass
class Shape:
    """What is asked of a slice."""

    shape: tuple[int, ...]

    def get_shape(self) -> list[int]:
        return list(self.shape)


@dataclass
class Fusing:
    """How a file becomes one for fused experts: the method that describes it then, and the file."""

    method: LoRA
    made: Made
    gone: set[str]

    def __call__(self, file: Any) -> Any:
        return Fused(file, self.made, self.gone)


def fusing(file: Any, method: Any, model: nn.Module) -> Fusing | None:
    """What to change where a LoRA's file has factors of single experts, or of a router, and the model has them as parameters; else None.

    Raises WeftError for factors that fit no part of the parameter: all of them in one message.
    """
    if not isinstance(method, LoRA):
        return None
    everything = dict(modules(model))
    found, wrong = _found(file, method, everything)
    if not found and not wrong:
        return None
    made: dict[str, tuple[tuple[int, ...], Callable[[Any], Tensor]]] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for path in dict.fromkeys(p for p, _ in found):
        module = everything[path]
        for i, name in enumerate(n for n in reversed(module._parameters) if (path, n) in found):
            factors = found[path, name]
            shape = (1, *logical(module, name)[0])[-3:]
            halves = 2 if name == "gate_up_proj" else 1
            wrong += _misfits(file, factors, shape, halves)
            each = [max((f.rank for (half, _), f in factors.items() if half == h), default=0) for h in range(halves)]
            full = f"{path}.{name}"
            ranks[full], scales[full] = sum(each), next(iter(factors.values())).scale
            at = f"{PREFIX}{path}.{'base_layer.' * i}lora_"
            made[f"{at}A.weight"] = (shape[0] * sum(each), shape[2]), _stacked(factors, shape, each, scales[full], "A")
            made[f"{at}B.weight"] = (shape[1], shape[0] * sum(each)), _stacked(factors, shape, each, scales[full], "B")
    if wrong:
        raise WeftError("\n".join(wrong))
    gone = {key for factors in found.values() for f in factors.values() for key in (f.A, f.B)}
    return Fusing(_described(method, ranks, scales, everything), made, gone)


def _found(
    file: Any, method: LoRA, everything: Mapping[str, nn.Module]
) -> tuple[dict[Where, dict[tuple[int, int], Factors]], list[str]]:
    """Each parameter's factors by (half, expert); and what is wrong."""
    found: dict[Where, dict[tuple[int, int], Factors]] = {}
    wrong: list[str] = []
    names = set(file.keys())
    for key in sorted(names):
        if not (key.startswith(PREFIX) and key.endswith(".lora_A.weight")):
            continue
        old = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        place = _place(old, everything)
        if place is None:
            continue
        path, name, half, expert = place
        if any(matcher(t)(f"{path}.{name}") for t in several(method.target_parameters)):
            continue
        if getattr(everything[path], "is_transposed", False) or not getattr(everything[path], "is_concatenated", True):
            wrong.append(f"{key}: {path} holds its gates and ups in turn or turned, and no file has single experts of such a module")
            continue
        other = key.removesuffix("A.weight") + "B.weight"
        if other not in names:
            wrong.append(f"{other} is missing from the file")
            continue
        rank, scale = method.scaled(old)
        found.setdefault((path, name), {})[half, expert] = Factors(key, other, rank, scale)
    return found, wrong


def _place(old: str, everything: Mapping[str, nn.Module]) -> tuple[str, str, int, int] | None:
    """(path, parameter, half, expert) of what was a linear layer at `old`, if it is a parameter now."""
    for before, after in (("", ""), *_RENAMED):
        now = old.replace(before, after)
        single = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", now)
        path = single[1] if single else now
        module = everything.get(path)
        if module is None or (now in everything and single):
            continue
        if not single:
            router = module._parameters.get("weight")
            alone = router is not None and len(logical(module, "weight")[0]) == 2 and not is_linear(module)
            return (path, "weight", 0, 0) if alone and not isinstance(module, nn.Embedding) else None
        name, half = _PARTS.get(single[3], ("", 0))
        if single[3] == "up_proj" and module._parameters.get("up_proj") is not None:  # experts without a gate
            name, half = "up_proj", 0
        return (path, name, half, int(single[2])) if module._parameters.get(name) is not None else None
    return None


def _misfits(file: Any, factors: Mapping[tuple[int, int], Factors], shape: tuple[int, ...], halves: int) -> list[str]:
    experts, outside, inside = shape
    wrong = []
    for (_, expert), f in factors.items():
        for key, want in ((f.A, (f.rank, inside)), (f.B, (outside // halves, f.rank))):
            got = tuple(file.get_slice(key).get_shape())
            if expert >= experts:
                wrong.append(f"{key}: this model has {experts} experts there")
            elif got != want:
                wrong.append(f"{key} is {got}; this model with this configuration needs {want}")
    return wrong


def _stacked(
    factors: Mapping[tuple[int, int], Factors], shape: tuple[int, ...], each: list[int], scale: float, which: str
) -> Callable[[Any], Tensor]:
    """Makes A (experts · rank, in) or B (out, rank · experts); an expert or a half that the file leaves out has zeros."""
    experts, outside, inside = shape

    def make(file: Any) -> Tensor:
        A, B = torch.zeros(experts, sum(each), inside), torch.zeros(experts, outside, sum(each))
        for (half, expert), f in factors.items():
            columns = slice(sum(each[:half]), sum(each[:half]) + f.rank)
            rows = slice(half * outside // len(each), (half + 1) * outside // len(each))
            if which == "A":
                A[expert, columns] = file.get_tensor(f.A).float()
            else:
                B[expert, rows, columns] = file.get_tensor(f.B).float() * (f.scale / scale)
        return A.flatten(0, 1) if which == "A" else B.permute(1, 2, 0).flatten(1)

    return make


def _described(method: LoRA, ranks: Mapping[str, int], scales: Mapping[str, float], everything: Mapping[str, nn.Module]) -> LoRA:
    """The method that builds adapters of these ranks and scales on these parameters, and on the layers that are still layers."""
    if method.dropout:
        told = "there can be no dropout inside fused experts, so dropout is 0 from now on: it matters if this adapter is trained on"
        warnings.warn(told, stacklevel=4)
    alphas = {p: scales[p] * (sqrt(r) if method.rslora else r) for p, r in ranks.items()}
    short = {p: ".".join(p.split(".")[-2:]) for p in ranks}
    for end in set(short.values()):  # one name for all layers where it means exactly these
        mine = [p for p in ranks if short[p] == end]
        there = sum(f"{q}.{n}".endswith(f".{end}") for q, m in everything.items() for n in m._parameters)
        if there != len(mine) or len({(ranks[p], alphas[p]) for p in mine}) > 1:
            short |= {p: p for p in mine}
    able = [p for p, m in everything.items() if method.accepts(m)]
    kept = tuple(t for t in several(method.targets) if t in ("all-linear", "all") or any(matcher(t)(p) for p in able))
    return replace(
        method, dropout=0.0, targets=kept,
        target_parameters=tuple(dict.fromkeys([*several(method.target_parameters), *short.values()])),
        rank_pattern={re.escape(short[p]): r for p, r in ranks.items()} | method.rank_pattern,
        alpha_pattern={re.escape(short[p]): a for p, a in alphas.items()} | method.alpha_pattern,
    )  # fmt: skip
