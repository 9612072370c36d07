"""Quantising a model in place, layer by layer, with a report of what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.core import Site, WeftError, is_conv1d, modules
from weft.quant.decoding import with_packed
from weft.quant.formats import Format, damage, format_of
from weft.quant.layers import QuantLinear, is_quantised


@dataclass(frozen=True)
class Packing:
    """What became of one weight."""

    path: str  # of the layer, with the parameter's name if that is not "weight"
    shape: tuple[int, ...]
    error: float  # ‖W - Ŵ‖ / ‖W‖ in the Frobenius norm
    bits: float  # per weight, counted from the tensors


@dataclass
class QuantReport:
    """What `quantise_` did."""

    base: str
    layers: list[Packing] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # path -> why the layer stays as it was

    @property
    def weights(self) -> int:
        """How many weights were quantised."""
        return sum(torch.Size(p.shape).numel() for p in self.layers)

    @property
    def bits(self) -> float:
        """Bits per quantised weight."""
        return sum(p.bits * torch.Size(p.shape).numel() for p in self.layers) / max(self.weights, 1)

    @property
    def error(self) -> float:
        """Root of the mean over the layers of the squared relative error."""
        return float((sum(p.error**2 for p in self.layers) / max(len(self.layers), 1)) ** 0.5)

    def __str__(self) -> str:
        size = f"{len(self.layers)} weights of {self.weights:,} numbers at {self.bits:.3f} bits"
        head = f"{self.base}: {size}, relative error {self.error:.4f}"
        worst = sorted(self.layers, key=lambda p: -p.error)[:3]
        return head + ("; largest at " + ", ".join(f"{p.path} ({p.error:.4f})" for p in worst) if worst else "")


def quantise_(
    model: nn.Module, base: str = "nf4", skip: Sequence[str] = (), progress: Callable[[str], None] | None = None, **options: Any
) -> QuantReport:
    """Pack the weights of a model in place, one layer at a time: linear layers, transformers' Conv1D and fused experts.

    Embeddings, norms, the output head and what is tied to either stay as they are.

    Args:
        base: One of `FORMATS` that can be written. options: Those of the format (nf4: block, nested, quant_scale; all: rounding, seed).
        skip: Layers to leave alone: a path, the end of one, or a glob.
        progress: Called with the path of each layer before it is packed.
    Raises:
        WeftError: unknown format or option, adapters are attached, nothing to quantise; NaN or Inf in weights, all of which are named.
            Nothing has been packed then.
    """
    form = format_of(base)
    form.checked(**options)
    if any(isinstance(m, Site) for _, m in modules(model)):
        raise WeftError("this model has adapters on it: quantise the base first, then call weft.adapt")
    report, done = QuantReport(base), cast("dict[int, dict[str, Tensor]]", {})
    found = list(candidates(model, skip, report.skipped))
    if not found:
        why = "; ".join(f"{p}: {r}" for p, r in list(report.skipped.items())[:5]) or "it has no linear layer and no fused experts"
        raise WeftError(f"there is nothing to quantise in this {type(model).__name__}: {why}")
    every = [(f"{path}.{n}", cast(Tensor, model.get_submodule(path)._parameters[n])) for path, names in found for n in names]
    if damaged := [wrong for name, weight in every if (wrong := damage(weight.detach(), name))]:
        more = f"\nand {len(damaged) - 10} more" if len(damaged) > 10 else ""
        raise WeftError("\n".join(damaged[:10]) + f"{more}\nNothing was packed: take an intact checkpoint.")
    for path, names in found:
        if progress is not None:
            progress(path)
        _pack_layer(model, path, names, form, report, done, options)
    return report


def candidates(model: nn.Module, skip: Sequence[str] = (), skipped: dict[str, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """(path, names of parameters) of every layer that `quantise_` packs. `skipped` is filled with the others and why.

    Works on a model on the meta device, so that a loader can ask before it reads a byte.
    """
    skipped = {} if skipped is None else skipped
    everything = dict(modules(model))
    heads = _heads(model)
    owners: dict[int, set[str]] = {}
    for path, module in everything.items():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), set()).add(path)
    able = {path: names for path, module in everything.items() if (names := packable(module))}
    for path, names in able.items():
        parent = everything.get(path.rpartition(".")[0])
        reason = None
        if id(everything[path]) in heads or path in ("score", "classifier"):
            reason = "the output head"
        elif any(path == s or path.endswith(f".{s}") or fnmatchcase(path, s) or fnmatchcase(path, f"*.{s}") for s in skip):
            reason = "named in skip"
        elif isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            reason = f"nn.{type(parent).__name__} reads its weight without calling it"
        elif tied := {q for n in names for q in owners[id(everything[path]._parameters[n])]} - set(able):
            reason = f"tied to {', '.join(sorted(tied))}"
        if reason is None:
            yield path, names
        else:
            skipped[path] = reason


def packable(module: nn.Module) -> list[str]:
    """The parameters of one layer that may be packed: none for embeddings, norms, convolutions and what is packed already."""
    if is_quantised(module):
        return []
    if type(module) is nn.Linear or is_conv1d(module):
        return ["weight"] if module._parameters["weight"] is not None and module._parameters["weight"].is_floating_point() else []
    kind = type(module).__name__.lower()
    if "expert" not in kind and "moe" not in kind:
        return []
    held = module._parameters.items()
    return [n for n, p in held if p is not None and p.dim() == 3 and p.is_floating_point() and "bias" not in n]


def install(
    model: nn.Module, path: str, tensors: dict[str, dict[str, Tensor]], shapes: dict[str, torch.Size], base: str, dtype: torch.dtype
) -> nn.Module:
    """Let the layer at `path` hold these packed tensors (parameter -> tensors), and return it: a linear layer becomes a QuantLinear."""
    module = model.get_submodule(path) if path else model
    if type(module) is nn.Linear:
        bias, training = module.bias, module.training
        module.__class__ = QuantLinear  # the object stays: others may refer to it, and it keeps its hooks
        module.__dict__.update(form=format_of(base), dtype=dtype, shapes=dict(shapes))
        cast(QuantLinear, module).hold("weight", tensors["weight"])
        assert module.bias is bias and module.training == training
    else:
        with_packed(module, tensors, shapes, base, dtype)
    return module


def roundtrip(weight: Tensor, base: str, **options: Any) -> Tensor:
    """What a weight is after quantisation: Ŵ of the same shape, dtype and device. Options and errors are those of `Format.pack`."""
    form = format_of(base)
    return form.unpack(form.pack(weight, **options), weight.shape, weight.dtype)


def bits(tensors: dict[str, Tensor], numel: int) -> float:
    """Bits per weight of packed tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values()) * 8 / numel


def relative_error(weight: Tensor, packed: Tensor) -> float:
    """‖W - Ŵ‖ / ‖W‖, summed piece by piece in fp64."""
    off = size = 0.0
    for a, b in zip(torch.split(weight.reshape(-1), 1 << 22), torch.split(packed.reshape(-1), 1 << 22), strict=True):
        off += float((a.float() - b.float()).square().sum(dtype=torch.float64))
        size += float(a.float().square().sum(dtype=torch.float64))
    return float((off / size) ** 0.5) if size else 0.0


def _pack_layer(
    model: nn.Module, path: str, names: list[str], form: Format, report: QuantReport, done: dict[int, dict[str, Tensor]],
    options: dict[str, Any],
) -> None:  # fmt: skip
    module = model.get_submodule(path) if path else model
    held, shapes, dtype = {}, {}, torch.float32
    for name in names:
        weight = cast(Tensor, module._parameters[name])
        shapes[name], dtype = weight.shape, weight.dtype
        if id(weight) not in done:
            done[id(weight)] = form.pack(weight, name=f"{path}.{name}", **options)
        held[name] = done[id(weight)]
        error = relative_error(weight.detach(), form.unpack(held[name], weight.shape, weight.dtype))
        where = path if name == "weight" else f"{path}.{name}"
        report.layers.append(Packing(where, tuple(weight.shape), error, bits(held[name], weight.numel())))
    install(model, path, held, shapes, form.name, dtype)


def _heads(model: nn.Module) -> set[int]:
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if ask is not None else None
    return set() if head is None else {id(head)}
