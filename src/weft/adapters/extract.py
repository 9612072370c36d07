"""From a fully fine-tuned model, the low-rank adapter that comes nearest to it: layer by layer, whole models never in memory at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weft.adapters.attach import attach, check_new, device_of
from weft.adapters.combine import Kept, Layer, plain_lora
from weft.adapters.combine_algebra import Factors
from weft.adapters.convert import approximate, changed, check_rank, holdable, matrix
from weft.adapters.files import write
from weft.adapters.targets import find
from weft.core import WeftError, modules
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
        device: Where to decompose; None: where the base is.
    Returns:
        The share of ‖ΔW‖² kept, by layer; its notes name what else differs (norms, biases, embeddings) and is not in the adapter.
    Raises:
        WeftError: weights that are missing, of another shape or not finite (all in one message); models that do not differ.

    Large matrices are decomposed at random (`combine_algebra.leading`): the kept share is within 0.1% of the best one.
    """
    check_rank(rank, energy)
    whole = isinstance(base, nn.Module)
    if not whole and output is None:
        raise WeftError("where to? Between folders, weft.extract needs output=, the folder for the adapter")
    frame: nn.Module = base if isinstance(base, nn.Module) else skeleton(str(base))
    if whole:
        check_new(frame, name)
    layers = {p: m for p, m in find(frame, LoRA(targets=targets if isinstance(targets, str) else tuple(targets))).items() if holdable(m)}
    before, after = _Weights(base), _Weights(tuned)
    parameters = [(path, key) for path, m in modules(frame) for key, p in m._parameters.items() if p is not None]
    everything = [(f"{path}.{key}" if path else key, path, key) for path, key in parameters]
    wrong = _differences(everything, before, after)
    if wrong:
        raise WeftError(f"{after.what} and {before.what} are no two states of one model:\n  " + "\n  ".join(wrong))
    made: dict[str, Factors] = {}
    kept: dict[str, Layer] = {}
    notes: list[str] = []
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
                home = device_of(layers[path]) if whole else torch.device("cpu")
                made[path] = Factors(factors.B.to(home), factors.A.to(home))
            else:
                notes.append(changed(full, change, old.to(place, torch.float32)))
    if not made:
        rest = f"; but {notes[0]}" if notes else ""
        raise WeftError(f"{after.what} has the same weights as {before.what} in all {len(layers)} layers that were looked at{rest}")
    built = plain_lora(frame, made)
    if output is not None:
        write(frame, built, output)
    if whole:
        attach(frame, built, name)
    return Kept(kept, tuple(notes))


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
