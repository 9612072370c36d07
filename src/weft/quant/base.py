"""How a frozen base is stored, as the user writes it: the dtypes of plain weights, and the formats of packed ones with their options."""

from __future__ import annotations

from typing import Any

import torch
import yaml

from weft.core import WeftError
from weft.quant.formats import FORMATS, format_of, writable

BASES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # 4, 2 and 2 bytes a weight


def parse_base(base: str) -> tuple[str, dict[str, Any]]:
    """("nf4", {"block": 128, "nested": False}) from "nf4:block=128,nested=false": how the frozen weights are to be stored.

    Raises:
        WeftError: an unknown format, an option that it does not have, a value that cannot be.
    """
    name, _, text = str(base).partition(":")
    if name not in ("auto", *BASES, *writable()):
        raise WeftError(f"base={base!r} is not one of {', '.join(('auto', *BASES, *writable()))}")
    options: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        key, equals, value = word.partition("=")
        if not equals:
            raise WeftError(f"base={base!r}: write options as in nf4:block=128,nested=false")
        options[key.strip()] = yaml.safe_load(value)
    if options and name not in FORMATS:
        raise WeftError(f"base={base!r}: {name} has no options")
    if name in FORMATS:
        format_of(name).checked(**options)
    return name, options
