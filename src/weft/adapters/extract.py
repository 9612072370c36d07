"""From a fully fine-tuned model, the low-rank adapter that comes nearest to it: layer by layer, whole models never in memory at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weft.adapters.attach import attach, check_new, device_of
from weft.adapters.combine import Kept, Layer, plain_lora
from weft.adapters.combine_algebra import Factors
from weft.adapters.convert import approximate, check_rank, holdable, matrix
from weft.adapters.files import write
from weft.adapters.targets import find, whole
from weft.core import Adapter, Replaced, Site, WeftError, modules
from weft.methods import LoRA
from weft.models.load import resolve, skeleton

Source = nn.Module | str | os.PathLike[str]


def extract(
    base: Source,
    tuned: Source,
    rank: int | None = None,
    *,
    energy: float | None = None,
    output: str | os.PathLike[str] | None = None,
    targets: str | tuple[str, ...] | list[str] = "all-linear",
    modules_to_save: str | tuple[str, ...] | list[str] = (),
    name: str = "extracted",
    device: str | torch.device | None = None,
) -> Kept:
    """The best LoRA for the difference ΔW = W_tuned - W_base of two models of one architecture (Eckart and Young 1936).

    Args:
        base: A model, which gets the adapter under `name`; or a folder (or hub id) of safetensors, which is read one tensor at a time.
        tuned: A model or a folder.
        rank: Of every layer (16 if neither this nor `energy` is given).
        energy: In place of a rank: the share of ‖ΔW‖² to keep in each layer; each gets the rank that it takes.
        output: Where to write the adapter, in peft's layout. Needed if `base` is a folder.
        targets: The layers to look at, as for LoRA.
        modules_to_save: What else is kept, whole and in fp32 as LoRA's `modules_to_save` keeps it: modules named like targets, of which
            those that changed are taken; or "changed": all that changed and that no LoRA holds (norms, embeddings, and the biases of the
            targets by LoRA's bias="lora_only").
        device: Where to decompose; None: where the base is.
    Returns:
        The share of ‖ΔW‖² kept, by layer; its notes name what else differs (norms, biases, embeddings), how large it is, and whether it is
        in the adapter.
    Raises:
        WeftError: weights that are missing, of another shape or not finite (all in one message); models that do not differ.

    Large matrices are decomposed at random (`combine_algebra.leading`): the kept share is within 0.1% of the best one.
    """
    check_rank(rank, energy)
    in_memory = isinstance(base, nn.Module)
    if not in_memory and output is None:
        raise WeftError("where to? Between folders, weft.extract needs output=, the folder for the adapter")
    frame: nn.Module = base if isinstance(base, nn.Module) else skeleton(str(base))
    if in_memory:
        check_new(frame, name)
    every = modules_to_save == "changed"
    method = LoRA(targets=cast(Any, targets), modules_to_save=() if every else cast(Any, modules_to_save))
    wanted = whole(frame, method)
    layers = {p: m for p, m in find(frame, method).items() if holdable(m) and p not in wanted}
    before, after = _Weights(base), _Weights(tuned)
    parameters = [(path, key) for path, m in modules(frame) for key, p in m._parameters.items() if p is not None]
    everything = [(f"{path}.{key}" if path else key, path, key) for path, key in parameters]
    wrong = _differences(everything, before, after)
    if wrong:
        raise WeftError(f"{after.what} and {before.what} are no two states of one model:\n  " + "\n  ".join(wrong))
    made: dict[str, Factors] = {}
    kept: dict[str, Layer] = {}
    left: dict[str, _Left] = {}
    with torch.no_grad():
        for full, path, key in everything:
            if not (before.has(full) and after.has(full)):
                continue  # a weight that is tied to another one is stored once
            old, new = before.get(full), after.get(full)
            place = device or (old.device if old.device.type != "meta" else "cpu")
            change = new.to(place, torch.float32) - old.to(place, torch.float32)
            if not change.isfinite().all():
                raise WeftError(f"{full} has numbers that are not finite in {after.what if old.isfinite().all() else before.what}")
            if not change.any():
                continue
            if path in layers and key == "weight":
                factors, kept[path] = approximate(matrix(change, layers[path]), rank, energy, path)
                home = device_of(layers[path]) if in_memory else torch.device("cpu")
                made[path] = Factors(factors.B.to(home), factors.A.to(home))
            else:
                left[full] = _Left(path, key, change.numel(), float(change.norm() / old.to(place, torch.float32).norm().clamp_min(1e-30)))
    biases = {full: one for full, one in left.items() if every and one.key == "bias" and one.path in made}
    named = {id(p) for m in wanted.values() for p in m._parameters.values()}  # whichever of its modules names a tied parameter
    found = dict(modules(frame))
    saved = {f: one for f, one in left.items() if f not in biases and (every or id(found[one.path]._parameters[one.key]) in named)}
    if not made and not saved:
        rest = f"; but {_told(left, 'no LoRA holds that')[0]}: modules_to_save=\"changed\" keeps it whole" if left else ""
        raise WeftError(f"{after.what} has the same weights as {before.what} in all {len(layers)} layers that were looked at{rest}")
    built = _built(frame, made, biases, saved, before, after)
    if output is not None:
        write(frame, built, output)
    if in_memory:
        attach(frame, built, name)
    lost = {full: one for full, one in left.items() if full not in biases and full not in saved}
    notes = [*_told(biases | saved, "kept whole"), *_told(lost, "left out")]
    if lost:
        notes.append(f'{sum(one.numbers for one in lost.values()):,d} numbers are left out: modules_to_save="changed" keeps them whole')
    return Kept(kept, tuple(notes))


@dataclass(frozen=True)
class _Left:
    """A parameter that changed and that is no low-rank update: of which module, how large, and the share of its norm that changed."""

    path: str
    key: str
    numbers: int
    share: float


def _told(left: Mapping[str, _Left], what: str) -> list[str]:
    """A note for each kind of parameter, those of all layers of a model together."""
    groups: dict[str, list[_Left]] = {}
    for full, one in left.items():
        groups.setdefault(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", full), []).append(one)
    return [
        f"{name} ({f'{len(ones)} tensors, ' if len(ones) > 1 else ''}{sum(o.numbers for o in ones):,d} numbers) changed by "
        f"{'up to ' if len(ones) > 1 else ''}{max(o.share for o in ones):.2g} of its norm: {what}"
        for name, ones in groups.items()
    ]


def _built(
    frame: nn.Module, made: dict[str, Factors], biases: Mapping[str, _Left], saved: Mapping[str, _Left], before: _Weights, after: _Weights
) -> dict[str, Adapter]:
    """The adapters: the low-rank ones, with the biases of their layers, and the modules kept whole."""
    everything = dict(modules(frame))
    owners: dict[int, list[str]] = {}  # of each parameter, all its names
    for path, module in everything.items():
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append(f"{path}.{key}" if path else key)
    moved = {id(everything[one.path]._parameters[one.key]) for one in saved.values()}  # what is tied is kept by all that share it
    roots = tuple(p for p, m in everything.items() if any(id(q) in moved for q in m._parameters.values()))
    modules_to_save = whole(frame, LoRA(modules_to_save=roots)) if roots else {}
    made = {path: factors for path, factors in made.items() if path not in modules_to_save}
    spread = {one.path: {"bias": after.get(full).float() - before.get(full).float()} for full, one in biases.items() if one.path in made}
    for path in made if spread else ():
        own = everything[path]._parameters.get("bias")
        if own is not None and own.is_meta:  # a skeleton's: LoRA's bias is the base's and the change
            everything[path]._parameters["bias"] = nn.Parameter(before.get(f"{path}.bias").float())
    built = plain_lora(frame, made, spread, "lora_only" if spread else "none") if made else {}
    if not modules_to_save:
        return built
    method = replace(cast(LoRA, next(iter(built.values())).method) if built else LoRA(targets=()), modules_to_save=roots)
    copies: dict[int, nn.Parameter] = {}
    for path, module in modules_to_save.items():
        names = [key for key, p in module._parameters.items() if p is not None]
        with torch.device("meta"):
            built[path] = Replaced(cast(Site, module), names)
        for key in names:
            own = module._parameters[key]
            assert own is not None
            if id(own) not in copies:
                value = after.get(next(full for full in owners[id(own)] if after.has(full)))
                home = own.device if not own.is_meta else torch.device("cpu")
                copies[id(own)] = nn.Parameter(value.to(home, torch.promote_types(value.dtype, torch.float32), copy=True))
            built[path]._parameters[key] = copies[id(own)]
    for adapter in built.values():
        adapter.method = method
    return built


def _packed(folder: Path) -> bool:
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # what is wrong with it is told when the model is made


class _Weights:
    """Tensors by name: those of a model in memory, or of a folder's safetensors, read when they are asked for."""

    def __init__(self, source: Source) -> None:
        self.files: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        if isinstance(source, nn.Module):
            self.what = f"this {type(source).__name__}"
            self.tensors = {k: v.detach() for k, v in source.named_parameters(remove_duplicate=False) if ".weft." not in k}
            return
        folder = Path(_folder(source))
        self.what = str(source)
        if (folder / "adapter_config.json").is_file():
            raise WeftError(f"{source} holds an adapter already, and two models are compared: name the folder of a whole one")
        if _packed(folder):
            raise WeftError(
                f"{source} is packed, and what packing lost would be taken for training: name the model in 16 bits that it was made from, "
                f"or write its numbers with weft.load_base({str(source)!r}, 'bf16').save_pretrained(folder) and name that folder"
            )
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as e:
                raise WeftError(f"{path} cannot be read: {e}. Copy or download it again") from None
            handle: Any = file
            self.files.update(dict.fromkeys(handle.keys(), file))

    def _key(self, name: str) -> str | None:
        """A bare model's file has no "model." or "transformer." in front, and the other way round."""
        have = self.files or self.tensors
        return next((k for k in (name, name.partition(".")[2]) if k in have), None)

    def has(self, name: str) -> bool:
        return self._key(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        key = self._key(name)
        assert key is not None
        return tuple(self.files[key].get_slice(key).get_shape() if self.files else self.tensors[key].shape)

    def get(self, name: str) -> Tensor:
        key = self._key(name)
        assert key is not None
        value: Tensor = self.files[key].get_tensor(key) if self.files else self.tensors[key]
        return value


def _folder(source: str | os.PathLike[str]) -> str:
    """The folder of a checkpoint. Raises WeftError if there is none here."""
    folder = Path(resolve(str(source)))
    if not folder.is_dir():
        raise WeftError(f"{source} is no folder here")
    if not list(folder.glob("*.safetensors")):
        raise WeftError(f"{source} holds no *.safetensors")
    return str(folder)


def _differences(everything: list[tuple[str, str, str]], before: _Weights, after: _Weights) -> list[str]:
    """What stands against comparing two sets of weights, in lines."""
    names = [full for full, _, _ in everything]
    wrong = [f"{n} is missing from {b.what}" for n in names for a, b in ((before, after), (after, before)) if a.has(n) and not b.has(n)]
    both = [n for n in names if before.has(n) and after.has(n)]
    if not both:
        return [f"{before.what} holds none of the weights that its configuration names"]
    wrong += [f"{n} is {after.shape(n)} in {after.what} and {before.shape(n)} in {before.what}" for n in both
              if before.shape(n) != after.shape(n)]  # fmt: skip
    return wrong[:8] + ([f"... and {len(wrong) - 8} more"] if len(wrong) > 8 else [])
