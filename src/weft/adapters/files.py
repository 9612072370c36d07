"""Saving and loading adapters. A file is checked whole, from its header, before a byte is loaded; all that is wrong comes in one error."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weft.adapters.attach import attach, attached, build, check_new, device_of, names
from weft.adapters.card import card
from weft.adapters.formats import OWN, PREFIX, Format, diffusers, format_for, format_of, key, unknown
from weft.adapters.formats.notes import encoded, with_notes
from weft.adapters.formats.per_expert import fusing
from weft.adapters.targets import whole, with_tied
from weft.core import Adapter, Replaced, WeftError, base_class, behind, is_sharded, modules, several

Model = TypeVar("Model", bound=nn.Module)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {  # how transformers' class names end -> what peft calls the task
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose head is trained with the adapter


def save(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write one adapter in peft's layout: adapter_config.json, adapter_model.safetensors, and a card for the hub, README.md.

    Files are written beside and renamed. Of a model that FSDP2 sharded: call it on every process; the first one writes.

    Args:
        folder: Made if missing. An adapter that lies there is replaced.
        name: Which adapter; may be left out if the model has only one.
    Returns:
        The folder.
    Raises:
        WeftError: unknown or ambiguous name; a disk that is full (what lay there before is untouched).
    """
    model = behind(model)
    have = names(model)
    if name is None:
        if len(have) != 1:
            raise WeftError(f"which adapter? weft.save(model, folder, name=...): there are {', '.join(map(repr, have)) or 'none'}")
        name = have[0]
    return write(model, attached(model, name), folder)


def write(model: nn.Module, adapters: Mapping[str, Adapter], folder: str | os.PathLike[str]) -> Path:
    """Write built adapters of a model, attached or not; of the model only its shape and its configuration are asked."""
    method = next(iter(adapters.values())).method
    format = format_of(type(method))
    saved = whole(model, method, strict=False)
    own = {path: a for path, a in adapters.items() if path not in saved}
    config: dict[str, Any] = {
        "auto_mapping": None, "base_model_name_or_path": _origin(model), "inference_mode": True, "peft_type": format.peft_type,
        "revision": None, "task_type": task_of(model),
    } | format.write(method, model, own) | next(iter(adapters.values())).__dict__.get("unknown", {})  # fmt: skip
    kept = [m.removeprefix("re:") for m in several(method.modules_to_save)] or None
    if not format.peft_type.startswith(OWN) and (kept or format.keeps):
        config["modules_to_save"] = kept
    if config["task_type"] is None:
        config["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise WeftError(f"{target} cannot be a folder for an adapter ({e.strerror}): choose another") from e
    state = tensors(adapters, format) | format.give(own)
    data = encoded(state, method, format.noted)
    readme = target / "README.md"
    existing = readme.read_text("utf-8", "surrogateescape") if readme.is_file() else None
    told = card(method, config, sum(t.numel() for t in state.values()), existing)
    written = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if any(is_sharded(p) for a in adapters.values() for p in a.parameters()) and torch.distributed.get_rank():
        return target
    write_atomically({target / WEIGHTS: data, target / CONFIG: written.encode(), readme: told.encode("utf-8", "surrogateescape")})
    return target


def tensors(adapters: Mapping[str, Adapter], format: Format) -> dict[str, Tensor]:
    """The tensors of an adapter under their names in the file; a shared one once, but where peft wants each module's own."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, adapter in adapters.items():
        each = isinstance(adapter, Replaced) and not format.peft_type.startswith(OWN)
        for parameter, p in adapter._parameters.items():
            if p is not None and (each or id(p) not in seen):
                own = cast(Any, p).full_tensor() if is_sharded(p) else p
                value = format.stored(adapter, parameter, own.detach()).contiguous().cpu()
                found[key(path, adapter, parameter)] = value.clone() if id(p) in seen else value
                seen.add(id(p))
    return found


def load(model: Model, folder: str | os.PathLike[str], name: str = "default") -> Model:
    """Attach a saved adapter (weft's, peft's, or a LoRA of diffusers') under a name, and let it alone work.

    Raises:
        WeftError: no adapter there, a pickle, a truncated file, a method or option that weft does not have, or tensors that do not
            fit this model: all of them in one message. The model is left as it was.
    """
    check_new(model, name)
    source = Path(folder)
    theirs = diffusers.file_of(source)
    config = {} if theirs else read_config(source)
    path = theirs or weights_file(source)
    seen: Callable[[Any], Any] = _as_it_is
    try:
        if theirs:
            with _opened(theirs) as opened:
                config, seen = diffusers.told(opened, model)
        _check_task(config, model)
        format = format_for(config)
        with _opened(path) as opened:
            file = seen(opened)
            method = with_notes(format.told(format.read(config), file.keys()), file.metadata(), format.noted)
            older, held = fusing(file, method, model), set(file.keys())
        method = method if older is None else older.method
        if given := config.get("modules_to_save"):
            method = replace(method, modules_to_save=tuple(dict.fromkeys(given)))
        if config.get("ensure_weight_tying"):
            method = with_tied(model, method, lambda p: any(k.startswith(f"{PREFIX}{p}.") and "base_layer" not in k for k in held))
        with torch.device("meta"):
            built = build(model, method, strict=False)
    except WeftError as e:
        raise WeftError(f"{source}: {e}") from None
    with _opened(path) as opened:
        file = seen(opened) if older is None else older(seen(opened))
        wanted = _match(built, file, path, model, format.beside)
        place = {path: device_of(module) for path, module in modules(model) if path in built}
        made: dict[int, nn.Parameter] = {}
        broken: list[str] = []
        empties = [adapter._parameters[parameter] for _, adapter, parameter, _ in wanted]  # held, so that their ids stay theirs
        for (where, adapter, parameter, named), empty in zip(wanted, empties, strict=True):
            assert empty is not None
            value: Tensor = file.get_tensor(named)
            if id(empty) not in made or not torch.equal(made[id(empty)], value.to(made[id(empty)])):  # tied here, and trained apart
                dtype = torch.promote_types(value.dtype, torch.float32)  # copied: sums over unaligned memory come out otherwise
                made[id(empty)] = nn.Parameter(value.to(place[where], dtype, copy=True))
                made[id(empty)].requires_grad_(empty.requires_grad)
                if not made[id(empty)].isfinite().all():
                    broken.append(named)
            adapter._parameters[parameter] = made[id(empty)]
        for where, adapter in built.items():
            for named, buffer in adapter._buffers.items():  # state of training, which no file holds
                if buffer is not None and buffer.is_meta:
                    adapter._buffers[named] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=place[where])
        format.take(built, {n: file.get_tensor(n) for n in format.beside if n in set(file.keys())})
    if broken:
        raise WeftError(f"{path} is damaged, or its training diverged:\n  " + "\n  ".join(_lines(broken, "that are not finite")))
    if strange := unknown(config, format.fields):  # plain attributes, which `save` writes back
        for adapter in built.values():
            adapter.__dict__["unknown"] = strange
        said = ", ".join(f"{k}={v!r}" for k, v in strange.items())
        warnings.warn(f"{source / CONFIG} has fields that this version of weft does not know: {said}. They are kept, and have no effect "
                      "here: if they change what is computed, this is not the adapter that was trained", stacklevel=2)  # fmt: skip
    attach(model, built, name)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a dictionary with at least a peft_type. Raises WeftError if it is missing or broken."""
    path = folder / CONFIG
    if not path.is_file():
        near = sorted(str(p.parent.relative_to(folder)) for deep in ("*", "checkpoints/*") for p in folder.glob(f"{deep}/{CONFIG}"))
        there = "there is no such folder" if not folder.is_dir() else f"it has no {CONFIG}"
        raise WeftError(f"{folder} holds no adapter: {there}" + (f"; there is one in {', in '.join(near)}" if near else ""))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as e:
        raise WeftError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise WeftError(f"{path} does not say a peft_type, so it is no adapter's configuration")
    return config


def weights_file(folder: Path) -> Path:
    """The safetensors file of an adapter. Raises WeftError if it is missing, or if there is only a pickle."""
    path = folder / WEIGHTS
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").exists():
        raise WeftError(
            f"{folder / 'adapter_model.bin'} is a pickle, which can run any code when it is read: weft refuses it. Convert it once where "
            f"you trust it: safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), '{WEIGHTS}')"
        )
    raise WeftError(f"{folder} has a configuration but no {WEIGHTS}")


def write_atomically(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their names, and rename them once all are on the disk. On a full disk: WeftError, and nothing has changed."""
    staged = {path.with_name(f".{path.name}.{os.getpid()}.tmp"): path for path in contents}
    try:
        for temporary, path in staged.items():
            with open(temporary, "wb") as f:
                f.write(contents[path])
                f.flush()
                os.fsync(f.fileno())
        for temporary, path in staged.items():
            temporary.replace(path)
    except OSError as e:
        for temporary in staged:
            with suppress(FileNotFoundError):
                temporary.unlink()
        first = next(iter(contents))
        raise WeftError(f"could not write {first}: {e.strerror}. What lay there before is untouched; make room and save again") from e


def _as_it_is(file: Any) -> Any:
    return file


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        size = path.stat().st_size
        head = path.read_bytes()[:8]
        promised = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if head[:2] in (b"PK", b"\x80\x02"):
            why = "it is a pickle with another name"
        else:
            why = "it is truncated" if promised < 10**8 else "it is no safetensors file"
        raise WeftError(f"{path} ({size:,d} bytes) cannot be read: {why} ({e}). Copy or download it again") from None


def _match(
    built: Mapping[str, Adapter], file: Any, path: Path, model: nn.Module, beside: tuple[str, ...]
) -> list[tuple[str, Adapter, str, str]]:
    """(module path, adapter, parameter, name in the file) for all that the adapter needs, or one error with all that does not fit."""
    have = set(file.keys())
    need, missing, shapes = [], [], []
    whose: dict[int, list[str]] = {}  # what is shared may stand in the file under the name of any of its owners, or of several
    for where, adapter in built.items():
        for parameter, p in adapter._parameters.items():
            whose.setdefault(id(p), []).append(key(where, adapter, parameter))
    for where, adapter in built.items():
        for parameter, p in adapter._parameters.items():
            if p is None:
                continue
            own = key(where, adapter, parameter)
            apart_too = isinstance(adapter, Replaced) and own in have  # modules kept whole may have been trained apart
            named = own if apart_too else next((n for n in whose[id(p)] if n in have), whose[id(p)][0])
            if named not in have:
                missing.append(named)
                continue
            found = tuple(file.get_slice(named).get_shape())
            if found != tuple(p.shape):
                shapes.append(f"{named} is {found}; this model with this configuration needs {tuple(p.shape)}")
            need.append((where, adapter, parameter, named))
    taken = {n for *_, n in need}
    copies = {n: named for *_, named in need for names in whose.values() if named in names for n in names if n in have - taken}
    apart = [n for n, named in copies.items() if not torch.equal(file.get_tensor(n), file.get_tensor(named))]
    extra = sorted(have - taken - set(missing) - set(beside) - set(copies))
    extra = [e for e in extra if not _copy_of_base(e, model)]
    wrong = _lines(shapes, "of another shape") + _lines(missing, "missing from the file")
    wrong += _lines(apart, "other than those of the layer that this model ties theirs to")
    wrong += _lines(extra, "in the file, but belonging to nothing here")
    if not need:
        wrong.insert(0, "not one tensor of the file fits this model: is it another base, or an inner part of the model?")
    if wrong:
        raise WeftError(f"{path} does not fit this {type(model).__name__}:\n  " + "\n  ".join(wrong))
    return need


def _copy_of_base(named: str, model: nn.Module) -> bool:
    """peft stores the frozen weight of a targeted embedding or head beside its adapter; it says nothing new."""
    return named.startswith(PREFIX) and named.endswith((".base_layer.weight",))


def _lines(found: list[str], what: str, most: int = 6) -> list[str]:
    if not found:
        return []
    more = [f"  ... and {len(found) - most} more"] if len(found) > most else []
    return [f"{len(found)} tensor{'s' if len(found) > 1 else ''} {what}:", *(f"  {f}" for f in found[:most]), *more]


def _origin(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    return getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None) or None


def _check_task(config: Mapping[str, Any], model: nn.Module) -> None:
    """Raise WeftError if the file was made for a head that this model does not have, or for a task that there is not."""
    given, here = config.get("task_type"), task_of(model)
    known = {*TASKS.values(), "FEATURE_EXTRACTION"}
    if given is not None and given not in known:
        raise WeftError(f"task_type={given!r} is no task of peft's: there are {', '.join(sorted(known))}, and null for none")
    if given in HEADED and here is not None and here != given:
        raise WeftError(
            f"this adapter was made for {given}, and this {base_class(model).__name__} is {here}: load the base as the class that the "
            f"adapter was trained on, or set task_type to null in {CONFIG} if the adapter alone is meant"
        )


def task_of(model: nn.Module) -> str | None:
    """What peft calls the task of a transformers model; None where there is no such task."""
    task = next((task for end, task in TASKS.items() if base_class(model).__name__.endswith(end)), None)
    if task == "SEQ_2_SEQ_LM":  # transformers names speech models and decoders that see pictures so too
        if not getattr(model.config, "is_encoder_decoder", False):
            return "CAUSAL_LM"
        return task if getattr(model, "main_input_name", "input_ids") == "input_ids" else None
    return task
