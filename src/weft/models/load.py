"""Loading a base: a folder, a hub id, or "embedded", the small model that is in the package. Frozen, and as transformers made it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging

from weft.core import WeftError, device_of
from weft.models import packed, stream
from weft.models.shards import Lazy, Shards
from weft.quant import BASES, FORMATS, candidates, computing, format_of, parse_base, writable

EMBEDDED = Path(__file__).parent / "embedded"


def resolve(name: str | Path) -> str:
    """What transformers is to load for a user's `name`: a folder that exists, or a hub id (which may download).

    Raises:
        WeftError: neither a folder nor of a hub id's form.
    """
    if str(name) == "embedded":
        return str(EMBEDDED)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    text = str(name)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        what = "is a file" if path.exists() else "is no folder here"
        raise WeftError(f"{text!r} {what}, nor of the form of a hub id (org/name). Write a model's folder, a hub id, or 'embedded'")
    return text


def load_base(
    name: str | Path = "embedded", base: str = "auto", device: str | torch.device | None = None,
    on_packed: Callable[[str, Tensor, str, dict[str, Tensor]], None] | None = None,
) -> Any:  # fmt: skip
    """A frozen pretrained model, in evaluation mode.

    Args:
        name: A folder with config.json and safetensors, a hub id, or "embedded".
        base: How the weights are stored. "fp32", "bf16", "fp16". "nf4", "fp4", "int8", "fp8": linear layers and experts are packed while
            the model is read, one tensor at a time, and all else is bf16 (fp32 on a CPU without 16-bit products); options follow a
            colon, as in "nf4:block=128,nested=false". "auto": as the checkpoint has it if that is quantised; else bf16 on an accelerator
            and fp32 on a CPU, where 16-bit products of the backward pass run up to a hundred times slower without special instructions.
        device: Where to; None takes the accelerator if there is one.
        on_packed: Called with name, values, format and packed tensors of every weight that is packed.
    Raises:
        WeftError: no such folder, no weights, only pickles, a truncated or missing shard, weights that do not belong to the configuration,
            that hold NaN or Inf, or that are quantised in a way which weft cannot read; an unknown `base`.
    """
    kind, options = parse_base(base)
    named = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    place = device_of(named, f"device={str(named)!r}")
    dtype = BASES.get(kind) or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    source = resolve(name)
    if Path(source).is_dir():
        _check_folder(Path(source))
    raw = _raw_config(source)
    method = packed.method_of(raw, name)
    if method is not None or kind in FORMATS:
        return _streamed(name, source, method, kind, options, place, on_packed)
    try:
        with _quiet(source):
            cls = _architecture(source)
            model, info = cls.from_pretrained(
                source, dtype=dtype, output_loading_info=True, local_files_only=Path(source).is_dir(),
                ignore_mismatched_sizes=True,  # `_check_weights` names them; transformers would only say that there are some
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise WeftError(f"{name} could not be loaded as a model: {first}") from e
    _check_weights(name, info)
    return model.to(place).eval().requires_grad_(False)


def _streamed(
    name: str | Path, source: str, method: str | None, kind: str, options: dict[str, Any], place: torch.device,
    on_packed: Callable[[str, Tensor, str, dict[str, Tensor]], None] | None,
) -> Any:  # fmt: skip
    """`load_base` of what is quantised, in the file or from now on."""
    folder = Path(source) if Path(source).is_dir() else _download(source)
    shards = Shards(folder)
    stored, plain = packed.find(shards, method)
    dtype = BASES.get(kind) or computing(torch.bfloat16, place)
    card = place.type == "cuda"
    state: dict[str, Any] = {key: Lazy(partial(shards.read, key, card)) for key in plain}
    state |= {key: Lazy(partial(what.numbers, dtype)) for key, what in stored.items()}
    keep = kind == "auto" or (kind in {s.base for s in stored.values()} and not options)
    kinds = sorted({s.base for s in stored.values() if s.base in writable()}) or ["nf4"]

    def wants(model: nn.Module) -> dict[str, list[str]]:
        if kind in BASES:
            return {}
        able = dict(candidates(model))
        if not keep:
            return able
        made = {f"{path}.{n}": (path, n) for path, names in able.items() for n in names}
        there = set(plain)
        chosen: dict[str, list[str]] = {}
        for key, (path, n) in made.items():  # those that a conversion makes from packed ones are packed again
            if key in stored or (key not in there and stored):
                chosen.setdefault(path, []).append(n)
        return chosen

    def pack(key: str, value: Tensor) -> tuple[str, dict[str, Tensor]]:
        if keep and key in stored:
            return stored[key].base, {k: t.to(place) for k, t in stored[key].tensors().items()}
        base, there = kinds[0] if keep else kind, value.to(place, non_blocking=True)
        if card:  # the CPU has looked already
            shards.check(key, there)
        return base, format_of(base).pack(there, name=key, **options)

    try:
        with _quiet(str(folder)):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            for part in (config, config.get_text_config()):
                if hasattr(part, "quantization_config"):
                    del part.quantization_config
            cls = _architecture(str(folder))
            if cls is transformers.AutoModelForCausalLM:  # which wants a folder; the class it would choose does not
                cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model, info = stream.load(cls, config, state, wants, pack, dtype, on_packed)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise WeftError(f"{name} could not be loaded as a model: {first}") from e
    _check_weights(name, info)
    model.name_or_path = model.config._name_or_path = source
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.to(place)
    if card:
        _check_numbers(shards, model)
    return model.eval().requires_grad_(False)


def _check_numbers(shards: Shards, model: nn.Module) -> None:
    """Raises WeftError if something that was read holds NaN or Inf: parameters, and buffers that are kept in files."""
    for key, value in model.state_dict().items():
        shards.check(key, value)


def _raw_config(source: str) -> dict[str, Any]:
    """config.json as it stands; of a hub id through transformers, whose error the caller's own loading will repeat."""
    if Path(source).is_dir():
        found = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    try:
        return dict(transformers.PretrainedConfig.get_config_dict(source)[0])
    except (OSError, ValueError) as e:
        raise WeftError(f"{source} could not be loaded as a model: {str(e).strip().splitlines()[0]}") from e


def _download(source: str) -> Path:
    """The folder that a hub id's files are in."""
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as e:
        raise WeftError(f"{source} could not be downloaded: {str(e).strip().splitlines()[0]}") from e


def skeleton(name: str | Path) -> Any:
    """The model that a folder's configuration describes, without its weights (on torch's meta device). Raises WeftError as `load_base`."""
    source = resolve(name)
    if Path(source).is_dir():
        _check_folder(Path(source))
    try:
        cls = _architecture(source)
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
        with torch.device("meta"):
            model = cls._from_config(config) if hasattr(cls, "_from_config") else cls.from_config(config)
    except (OSError, ValueError, KeyError) as e:
        raise WeftError(f"{name} does not describe a model: {(str(e).strip().splitlines() or [type(e).__name__])[0]}") from e
    model.config.name_or_path = source if name != "embedded" else name
    return model


def load_tokenizer(name: str | Path = "embedded") -> Any:
    """The tokenizer beside a base. Raises WeftError if there is none."""
    source = resolve(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    except (OSError, ValueError, KeyError) as e:
        raise WeftError(f"{name} has no tokenizer that transformers can load: {str(e).strip().splitlines()[0]}") from e


def _architecture(source: str) -> Any:
    """The class that the configuration names, for a language model the one with its head."""
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    named = (getattr(config, "architectures", None) or [None])[0]
    cls = getattr(transformers, named, None) if named else None
    return cls if cls is not None and named and not named.endswith("Model") else transformers.AutoModelForCausalLM


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        adapter = (
            " (it holds an adapter: give its base here, and the adapter by --adapter)" if (folder / "adapter_config.json").exists() else ""
        )
        raise WeftError(f"{folder} has no config.json, so it is no model's folder{adapter}")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as e:
        raise WeftError(f"{config} is not valid JSON: {e}") from None
    if not list(folder.glob("*.safetensors")):
        pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        found = (
            f"only pickles ({', '.join(pickles[:3])}), which weft refuses: they can run any code. Convert them" if pickles else "no weights"
        )
        raise WeftError(f"{folder} has {found}: weft reads *.safetensors")


def _check_weights(name: str | Path, info: Any) -> None:
    """transformers only warns of weights that are missing or of another shape, and goes on with random numbers."""
    missing = sorted(info["missing_keys"])
    wrong = sorted(f"{key} (is {tuple(there)}, should be {tuple(here)})" for key, there, here in info.get("mismatched_keys", ()))
    if missing or wrong:
        told = [f"missing: {', '.join(missing[:5])}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}"] if missing else []
        told += [f"of another shape: {', '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}"] if wrong else []
        unexpected = sorted(info.get("unexpected_keys", ()))
        told += [f"in the file but not in the model: {', '.join(unexpected[:5])}"] if unexpected else []
        raise WeftError(f"the weights of {name} do not belong to its config.json; " + "; ".join(told))


@contextmanager
def _quiet(source: str) -> Iterator[None]:
    """No progress bar for a model that loads in a blink, and no table of keys: what is wrong with them is an error here."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    small = Path(source).is_dir() and sum(p.stat().st_size for p in Path(source).glob("*.safetensors")) < 10**9
    logging.set_verbosity_error()
    if small:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
