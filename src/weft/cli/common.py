"""What several commands share: where output goes, and loading a base with its adapters."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cli.main import UsageError

if TYPE_CHECKING:
    from rich.console import Console

WORTH_TELLING = 2.0  # seconds: what takes longer says when it is done


def out() -> Console:
    """Results: standard output. Colours only on a terminal, and never with NO_COLOR."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def err() -> Console:
    """Progress and messages: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One message on standard error."""
    err().print(text, markup=False, style="dim")


@contextmanager
def step(what: str, spin: bool = True, tell: bool = True) -> Iterator[None]:
    """Shows `what` while the block runs by a spinner on a terminal; afterwards, if `tell`, a line if it took over two seconds."""
    from rich.markup import escape

    console, began = err(), time.perf_counter()
    with console.status(escape(what)) if spin and console.is_terminal else nullcontext():
        yield
    if tell and (seconds := time.perf_counter() - began) > WORTH_TELLING:
        console.print(f"{what}: {seconds:.1f} s", markup=False, style="dim")


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which do not know that a spinner is turning."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


class Once(argparse.Action):
    """A flag whose second value would silently take the place of the first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        if (first := getattr(namespace, self.dest)) is not None:
            hint = f"; `weft combine {first} {values} -o DIR` makes one of several" if self.dest == "adapter" else ""
            raise UsageError(f"{flag} takes one, and {first} and {values} are given{hint}")
        setattr(namespace, self.dest, values)


def model_arguments(parser: argparse.ArgumentParser, many: bool = True) -> None:
    """--model, --adapter, --base and --device."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="M",
                       help='a folder, a hub id, or "embedded"; left out: the base of the adapter, else "embedded"')  # fmt: skip
    if many:
        group.add_argument("--adapter", metavar="DIR[=NAME]", action="append", default=[],
                           help="an adapter's folder; may be given several times")  # fmt: skip
    else:
        group.add_argument("--adapter", metavar="DIR", required=True, action=Once, help="the adapter's folder")
    group.add_argument("--base", metavar="B", default="auto",
                       help="how the base is stored: fp32, bf16, fp16, nf4, fp4, int8, fp8, or with options nf4:block=128,nested=false; "
                       "auto: as the file is if that is quantised, else as the adapter was trained if that was packed, else bf16 on an "
                       "accelerator, fp32 on a CPU (default: auto)")  # fmt: skip
    group.add_argument("--device", default=None, metavar="D", help="cpu, cuda, cuda:1; left out: cuda if there is one")


@dataclass(frozen=True)
class Given:
    """An adapter as the user named it."""

    name: str
    folder: Path


def adapters_given(words: Sequence[str]) -> list[Given]:
    """From `DIR` or `DIR=NAME` each; without a name it is the folder's. Raises UsageError for a name given twice."""
    found: list[Given] = []
    for word in words:
        folder, equals, name = (word, "", "") if Path(word).exists() else word.rpartition("=") if "=" in word else (word, "", "")
        path = Path(folder).expanduser()
        name = name if equals else path.resolve().name.replace(".", "-")
        if any(g.name == name for g in found):
            raise UsageError(f"two adapters are named {name!r}: give one another name, as in --adapter {folder}=other")
        found.append(Given(name, path))
    return found


def base_of(model: str | None, adapters: Sequence[Given]) -> str:
    """The base to load: what the user says, else what the first adapter that knows says, else the embedded one."""
    if model is not None:
        return model
    for given in adapters:
        if named := _trained_on(given.folder):
            return named
    if adapters and not adapters[0].folder.is_dir():
        hub = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(adapters[0].folder)):
            hub = f"; one of the hub is fetched by `hf download {adapters[0].folder} --local-dir DIR`"
        raise UsageError(f"{adapters[0].folder} holds no adapter: there is no such folder{hub}")
    if adapters:
        raise UsageError(f"{adapters[0].folder} does not say which base it belongs to: give it by --model")
    return "embedded"


def _trained_on(folder: Path) -> str | None:
    """The base that an adapter's recipe.yaml or adapter_config.json names."""
    recipe = settings_of(folder)
    if isinstance(recipe.get("model"), str):
        return recipe["model"]
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # loading it tells the user what is wrong with it
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return named if isinstance(named, str) and named else None


def settings_of(folder: Path) -> dict[str, Any]:
    """What stands in the recipe.yaml beside an adapter; empty if there is none."""
    import yaml

    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def packed_file(model: str) -> bool:
    """Whether the model's own file is packed, so that there are no 16-bit weights in it."""
    from weft.models import resolve

    try:
        return "quantization_config" in json.loads((Path(resolve(model)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # loading it will tell what is wrong with it


def _as_trained(model: str, adapters: Sequence[Given]) -> str:
    """The packed format that the first adapter's recipe gave its base; "auto" where it gave none, or where the model's file is packed."""
    from weft.quant import FORMATS, parse_base

    named = str(settings_of(adapters[0].folder).get("base", "auto")) if adapters else "auto"
    if parse_base(named)[0] not in FORMATS or packed_file(model):
        return "auto"
    say(f"the base is packed in {named}, as {adapters[0].name} was trained; --base says otherwise")
    return named


def load(model: str, adapters: Sequence[Given], base: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """(model with all adapters attached and the first one working, tokenizer). A missing adapter is told before a large base is loaded."""
    with step("loading libraries", tell=False):
        import weft.adapters
        from weft.adapters.files import weights_file
        from weft.models import load_base, load_tokenizer
    for given in adapters:
        weft.adapters.read_config(given.folder)
        weights_file(given.folder)
    base = _as_trained(model, adapters) if base == "auto" else base
    here = model == "embedded" or Path(model).expanduser().is_dir()  # a hub id may download, which shows its own progress
    with step(f"loading {model}", spin=here), no_bars() if here else nullcontext():
        loaded = load_base(model, base, check_device(device))
        tokenizer = load_tokenizer(model)
    for given in adapters:
        with step(f"loading {given.folder}"):
            weft.adapters.load(loaded, given.folder, given.name)
    if adapters:
        weft.adapters.use(loaded, adapters[0].name)
    return loaded, tokenizer


def check_device(device: str | None) -> str | None:
    """The device as torch understands it. Raises UsageError for one that it does not know or that is not there."""
    if device in (None, "auto"):
        return None
    from weft.core import WeftError, device_of

    try:
        device_of(device, f"--device {device}")
    except WeftError as e:
        raise UsageError(str(e)) from None
    return device
