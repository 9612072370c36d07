"""Bases: loading one from a folder or a hub id, the one that is in the package, and the attention seam."""

from weft.models.load import BASES, EMBEDDED, load_base, load_tokenizer, parse_base, resolve
from weft.models.positions import ends, room

__all__ = ["BASES", "EMBEDDED", "ends", "load_base", "load_tokenizer", "parse_base", "resolve", "room"]
