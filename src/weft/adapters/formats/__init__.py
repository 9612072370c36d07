"""peft's adapter files and weft's methods: one file a family of methods, each with its configuration and its tensor names.

Verified against peft 0.21.2; tests/parity holds both directions to 1e-6. An adapter's parameters have the shapes of peft's tensors, so
that reading and writing is naming.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.adapters.formats import adalora, ia3, ln_tuning, lora, lycoris, oft, prompts, trainable_tokens, vera
from weft.adapters.formats.base import OWN, PREFIX, Field, Format, own_format, short_names, unknown
from weft.core import METHODS, Adapter, Method, WeftError

# A new family of methods: a file beside this one with NAMES and FORMATS, and its name here.
FAMILIES = (adalora, ia3, ln_tuning, lora, lycoris, oft, prompts, trainable_tokens, vera)
NAMES: dict[type[Adapter], dict[str, str]] = {kind: names for family in FAMILIES for kind, names in family.NAMES.items()}
FORMATS: dict[type[Method], Format] = {method: format for family in FAMILIES for method, format in family.FORMATS.items()}

__all__ = ["FORMATS", "NAMES", "OWN", "PREFIX", "Field", "Format", "format_for", "format_of", "key", "short_names", "unknown"]


def key(path: str, adapter: Adapter, parameter: str) -> str:
    """The name in the file of one parameter of the adapter at `path`."""
    suffix = NAMES.get(type(adapter), {}).get(parameter, parameter)
    if suffix.startswith("/"):  # the whole name
        return suffix[1:]
    root = format_of(type(adapter.method)).root
    return f"{root}{path}.{suffix}" if path else f"{root}{suffix}"


def format_of(method: type[Method]) -> Format:
    """How this method is written: in peft's way if peft has it, else in weft's own."""
    return FORMATS.get(method) or own_format(method)


def format_for(config: Mapping[str, Any]) -> Format:
    """How to read this configuration. Raises WeftError for a type that weft does not have."""
    known = [f for f in map(format_of, METHODS.values()) if f.peft_type == config["peft_type"]]
    if not known:
        have = sorted({f.peft_type for f in map(format_of, METHODS.values()) if not f.peft_type.startswith(OWN)})
        raise WeftError(f"weft does not have the method {config['peft_type']!r}; of peft's it has {', '.join(have)}")
    return next((f for f in known if f.claims(config)), known[0])
