"""Where in peft's package each name is found, so that `from peft.tuners.lora import LoraLayer` finds it here as well."""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

HOME = "weft.compat.peft"
# peft's module -> this package's modules whose names stand there
PLACES: dict[str, tuple[str, ...]] = {
    "auto": ("tasks",), "mapping_func": ("mapping",), "peft_model": ("model", "tasks", "status"), "mixed_model": ("mixed",),
    "functional": ("switching", "mapping", "state"), "import_utils": ("absent",),
    "tuners": ("tuner", "tuners_more", "configs", "configs_lora"),
    "tuners.tuners_utils": ("tuner", "layers", "targets", "switching", "helpers"),

    "tuners.lora": ("layers_lora", "parameters", "configs_lora", "tuners_more", "conversion", "eva"), "tuners.lora.eva": ("eva",),
    "utils.incremental_pca": ("incremental_pca",), "utils.loftq_utils": ("loftq",),
    "tuners.lora.layer": ("layers_lora", "parameters"),
    "tuners.lora.model": ("tuners_more",),
    "tuners.lora.config": ("configs_lora",), "tuners.lora.conversion": ("conversion",),
    "tuners.adalora": ("layers_lora", "configs_lora", "tuners_more", "conversion"),
    "tuners.adalora.layer": ("layers_lora",), "tuners.adalora.config": ("configs_lora",), "tuners.adalora.model": ("tuners_more",),
    "tuners.mixed": ("mixed",), "tuners.mixed.model": ("mixed",),
    "tuners.prefix_tuning": ("configs",), "tuners.prompt_tuning": ("configs",), "tuners.p_tuning": ("configs",),
    "utils": ("kinds", "config", "helpers", "loftq", "state", "wrappers", "tokens", "targets", "defaults", "switching"),
    "utils.other": ("helpers", "state", "wrappers", "tokens", "targets", "config"), "utils.peft_types": ("kinds",),
    "utils.error": ("kinds",), "utils.warning": ("kinds",), "utils.save_and_load": ("state", "config"),
    "utils.constants": ("defaults", "state", "config", "targets"), "utils.integrations": ("absent",), "utils.merge_utils": ("absent",),
    "utils.hotswap": ("hotswap",), "utils.transformers_weight_conversion": ("bridging",), "optimizers": ("optimizers",),
}  # fmt: skip
for _family in ("ia3", "loha", "lokr", "oft", "vera", "ln_tuning", "trainable_tokens"):
    for _part, _source in (("", ("families", "configs", "tuners_more")), (".layer", ("families",)), (".config", ("configs",)),
                           (".model", ("tuners_more",))):  # fmt: skip
        PLACES[f"tuners.{_family}{_part}"] = _source
OTHER_NAMES = {  # peft's name -> ours, where they differ
    "defaults": {
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": "LORA", "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING": "ADALORA",
        "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": "IA3", "TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING": "LN_TUNING",
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": "IA3_FEEDFORWARD",
        "TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING": "VERA",
    },
    "targets": {"SEQ_CLS_HEAD_NAMES": "HEADS", "INCLUDE_LINEAR_LAYERS_SHORTHAND": "SHORTHAND", "DUMMY_TARGET_MODULES": "DUMMY"},
}  # fmt: skip


def build(package: ModuleType) -> None:
    """Make peft's modules out of the table, under this package's name."""
    for place, sources in PLACES.items():
        module = ModuleType(f"{HOME}.{place}")
        if any(p.startswith(f"{place}.") for p in PLACES):
            module.__path__ = []
        for source in reversed(sources):
            names = vars(sys.modules[f"{HOME}.{source}"])
            module.__dict__.update({k: v for k, v in names.items() if not k.startswith("__") and not isinstance(v, ModuleType)})
            module.__dict__.update({theirs: names[ours] for theirs, ours in OTHER_NAMES.get(source, {}).items()})
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
        sys.modules[module.__name__] = module
    for place in PLACES:
        above, _, last = place.rpartition(".")
        setattr(sys.modules[f"{HOME}.{above}"] if above else package, last, sys.modules[f"{HOME}.{place}"])


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, version: str) -> None:
        self.text = f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError("the face of peft is no installed package of its own")


class _Finder(importlib.abc.MetaPathFinder):
    """Says which version of peft `importlib.metadata` finds, since libraries ask before they use it."""

    def __init__(self, version: str) -> None:
        self.version = version

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        if getattr(context, "name", None) in (None, "peft"):
            return [_Distribution(self.version)]
        return []


def install(version: str) -> None:
    """From now on `import peft`, anywhere in this process, means this package. Call it before transformers or TRL are imported."""
    real = sys.modules.get("peft")
    if real is not None and real.__name__ != HOME:
        raise ImportError("peft itself is imported in this process already: call weft.compat.peft.install() before that")
    sys.modules["peft"] = sys.modules[HOME]
    for name in [n for n in sys.modules if n.startswith(f"{HOME}.")]:
        sys.modules[f"peft{name.removeprefix(HOME)}"] = sys.modules[name]
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(version))
