"""Hyper-parameters that peft's configurations have no field for, in the header of the safetensors file beside "format".

peft warns of a field that it does not know, and old versions of it stop there; at a header's metadata neither it nor vLLM looks.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace

from safetensors.torch import save as to_bytes
from torch import Tensor

from weft.core import Method, WeftError

SECTION = "weft"


def encoded(tensors: dict[str, Tensor], method: Method, noted: tuple[str, ...]) -> bytes:
    """A safetensors file of these tensors, and of the noted hyper-parameters that are not what they are by default."""
    notes = {name: getattr(method, name) for name, default in _defaults(method, noted).items() if getattr(method, name) != default}
    if not notes:
        return to_bytes(tensors, metadata={"format": "pt"})
    data = to_bytes(tensors, metadata={"format": "pt", SECTION: json.dumps(notes, sort_keys=True)})
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])  # safetensors writes its metadata in another order each time, but equal runs have equal files
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    made = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    made += b" " * (-len(made) % 8)
    return struct.pack("<Q", len(made)) + made + data[8 + size :]


def with_notes(method: Method, metadata: Mapping[str, str] | None, noted: tuple[str, ...]) -> Method:
    """The method with what the header of its file says. Raises WeftError for a section that is damaged."""
    text = (metadata or {}).get(SECTION)
    if text is None:
        return method
    try:
        notes = json.loads(text)
    except ValueError:
        notes = None
    known = _defaults(method, noted)
    if not isinstance(notes, dict) or not all(_alike(v, known[k]) for k, v in notes.items() if k in known):
        raise WeftError(f"the header of the file says {SECTION}={text!r}, which is no set of hyper-parameters")
    if strange := sorted(set(notes) - set(known)):
        warnings.warn(f"the header of the file has notes that this version of weft does not know: {', '.join(strange)}", stacklevel=4)
    return replace(method, **{k: v for k, v in notes.items() if k in known})


def _alike(value: object, default: object) -> bool:
    return type(value) is type(default) or (type(value) is int and type(default) is float)


def _defaults(method: Method, noted: tuple[str, ...]) -> dict[str, object]:
    return {f.name: f.default for f in fields(method) if f.name in noted}
