"""weft: parameter-efficient fine-tuning of PyTorch models.

In weaving, the warp is held fixed on the loom and the weft is the thin thread drawn through it that makes the pattern.
Here the warp is a frozen pretrained model and the weft is an adapter.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module it lives in. Loaded on first use, so that `import weft` and `weft --help` cost nothing.
_HOME = {
    "WeftError": "weft.core",
    "Adapter": "weft.core",
    "Method": "weft.core",
    "Site": "weft.core",
    "DoRA": "weft.methods",
    "ALoRA": "weft.methods",
    "AdaLoRA": "weft.methods",
    "VeRA": "weft.methods",
    "LoRA": "weft.methods",
    "BitFit": "weft.methods",
    "IA3": "weft.methods",
    "LNTuning": "weft.methods",
    "PTuning": "weft.methods",
    "PrefixTuning": "weft.methods",
    "PromptTuning": "weft.methods",
    "LoHa": "weft.methods",
    "LoKr": "weft.methods",
    "OFT": "weft.methods",
    "Bottleneck": "weft.methods",
    "Subspace": "weft.methods",
    "TrainableTokens": "weft.methods",
    "Full": "weft.methods",
    "adapt": "weft.adapters",
    "combine": "weft.adapters",
    "convert": "weft.adapters",
    "eva": "weft.adapters.eva",
    "extract": "weft.adapters.extract",
    "load": "weft.adapters",
    "loftq_": "weft.adapters.loftq",
    "merge": "weft.adapters",
    "remove": "weft.adapters",
    "rows": "weft.adapters",
    "save": "weft.adapters",
    "summary": "weft.adapters",
    "unmerge": "weft.adapters",
    "use": "weft.adapters",
    "using": "weft.adapters",
    "load_base": "weft.models",
    "load_tokenizer": "weft.models",
    "fit": "weft.train",
    "fit_together": "weft.train",
    "Recipe": "weft.train",
}
__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:
    from weft.adapters import adapt, combine, convert, load, merge, remove, rows, save, summary, unmerge, use, using
    from weft.adapters.eva import eva
    from weft.adapters.extract import extract
    from weft.adapters.loftq import loftq_
    from weft.core import Adapter, Method, Site, WeftError
    from weft.methods import (
        IA3,
        OFT,
        AdaLoRA,
        ALoRA,
        BitFit,
        Bottleneck,
        DoRA,
        Full,
        LNTuning,
        LoHa,
        LoKr,
        LoRA,
        PrefixTuning,
        PromptTuning,
        PTuning,
        Subspace,
        TrainableTokens,
        VeRA,
    )
    from weft.models import load_base, load_tokenizer
    from weft.train import Recipe, fit, fit_together


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
