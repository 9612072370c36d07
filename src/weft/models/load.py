"""Loading a base: a folder, a hub id, or "embedded", the small model that is in the package. Frozen, and as transformers made it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging

from weft.core import WeftError

EMBEDDED = Path(__file__).parent / "embedded"
BASES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # how the frozen weights are stored, 4, 2 and 2 bytes each


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


def load_base(name: str | Path = "embedded", base: str = "auto", device: str | torch.device | None = None) -> Any:
    """A frozen pretrained model, in evaluation mode.

    Args:
        name: A folder with config.json and safetensors, a hub id, or "embedded".
        base: How the weights are stored: "fp32", "bf16", "fp16", or "auto": bf16 on an accelerator, fp32 on a CPU, where 16-bit products
            of the backward pass run up to a hundred times slower without special instructions.
        device: Where to; None takes the accelerator if there is one.
    Raises:
        WeftError: no such folder, no weights, only pickles, weights that do not belong to the configuration, an unknown `base`.
    """
    if base not in ("auto", *BASES):
        raise WeftError(f"base={base!r} is not one of auto, {', '.join(BASES)}")
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = BASES.get(base) or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    source = resolve(name)
    if Path(source).is_dir():
        _check_folder(Path(source))
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
    model = model.to(place).eval().requires_grad_(False)
    return model


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
