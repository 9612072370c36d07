"""Where in peft's package each name is found, so that `from peft.tuners.lora import LoraLayer` finds it here as well."""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from weft.compat.peft import absent, families
from weft.compat.peft.kinds import PeftType

HOME = "weft.compat.peft"
# peft's module -> this package's modules whose names stand there
PLACES: dict[str, tuple[str, ...]] = {
    "auto": ("tasks",), "mapping_func": ("mapping",), "peft_model": ("model", "tasks", "status"), "mixed_model": ("mixed",),
    "functional": ("switching", "mapping", "state"), "import_utils": ("small",),
    "tuners.lycoris_utils": ("families", "configs", "tuner"),
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
    "tuners.prefix_tuning.config": ("configs",), "tuners.prompt_tuning.config": ("configs",), "tuners.p_tuning.config": ("configs",),
    "utils": ("kinds", "config", "helpers", "loftq", "state", "wrappers", "tokens", "targets", "defaults", "switching"),
    "utils.other": ("helpers", "state", "wrappers", "tokens", "targets", "config"), "utils.peft_types": ("kinds",),
    "utils.error": ("kinds",),
    "utils.warning": ("kinds",), "utils.save_and_load": ("state", "config"), "utils.constants": ("defaults", "state", "config", "targets"),
    "utils.integrations": ("small",), "utils.merge_utils": ("merging",), "utils.hotswap": ("hotswap",),
    "utils.transformers_weight_conversion": ("bridging",), "optimizers": ("optimizers",),
    "optimizers.loraplus": ("optimizers",), "optimizers.lorafa": ("optimizers",),
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
        "TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING": "VERA", "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING": "LORA",
        "TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING": "LORA", "TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING": "LORA",
    },
    "tuners_more": {"PEFT_TYPE_TO_TUNER_MAPPING": "TUNERS", "PEFT_TYPE_TO_PREFIX_MAPPING": "PREFIXES"},
    "mixed": {"COMPATIBLE_TUNER_TYPES": "COMPATIBLE"},
    "targets": {"_ExcludedModule": "ExcludedModule", "SEQ_CLS_HEAD_NAMES": "HEADS",
                "INCLUDE_LINEAR_LAYERS_SHORTHAND": "SHORTHAND", "DUMMY_TARGET_MODULES": "DUMMY"},
}  # fmt: skip


APART = ("__init__", "absent", "families", "layers_lora", "places")  # whose names mean something else in another module


def build(package: ModuleType) -> None:
    """Make peft's modules out of the table, under this package's name. A name that the face has is found in all of them."""
    own = {n: m for n, m in vars(package).items() if isinstance(m, ModuleType) and m.__name__ == f"{HOME}.{n}"}
    everywhere = _names(own[n] for n in own if n not in APART) | {"register_peft_method": absent.absent("register_peft_method")}
    for place in (*PLACES, *(p for p in absent.PLACES if p not in PLACES)):
        module = ModuleType(f"{HOME}.{place}")
        if any(p.startswith(f"{place}.") for p in (*PLACES, *absent.PLACES)):
            module.__path__ = []
        gone = f"{absent.PLACES.get(place, '')} {absent.INNER.get(place, '')}".split()
        module.__dict__.update({n: absent.absent(n) for n in gone} | everywhere | _of_family(place))
        module.__dict__.update(_names(own[s] for s in reversed(PLACES.get(place, ()))))
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
        sys.modules[module.__name__] = module
    for name in ("config", "helpers", "mapping"):  # which are called the same in peft
        gone = absent.INNER.get(name, "").split()
        for key, value in ({n: absent.absent(n) for n in gone} | everywhere).items():
            vars(own[name]).setdefault(key, value)
    for place in (*PLACES, *absent.PLACES):
        above, _, last = place.rpartition(".")
        setattr(sys.modules[f"{HOME}.{above}"] if above else package, last, sys.modules[f"{HOME}.{place}"])


def _names(sources: Iterable[ModuleType]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for source in sources:
        names = vars(source)
        found |= {k: v for k, v in names.items() if not k.startswith("__") and not isinstance(v, ModuleType)}
        found |= {theirs: names[ours] for theirs, ours in OTHER_NAMES.get(source.__name__.rpartition(".")[2], {}).items()}
    return found


def _of_family(place: str) -> dict[str, Any]:
    """The layers of a method by their classes' names in peft: `peft.tuners.ia3.Linear`."""
    kind = place.split(".")[1].upper() if place.count(".") else ""
    if kind not in ("IA3", "LOHA", "LOKR", "OFT", "VERA"):
        return {}
    return {n: families.named(families.LAYERS[PeftType(kind)], n) for n in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding")}


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
