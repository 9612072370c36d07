"""Bases: loading one from a folder or a hub id, the one that is in the package, and the attention seam."""

from weft.models.load import EMBEDDED, load_base, load_tokenizer, resolve
from weft.models.positions import ends, room

__all__ = ["EMBEDDED", "ends", "load_base", "load_tokenizer", "resolve", "room"]
