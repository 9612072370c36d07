"""What one does with adapters on a model."""

from weft.adapters.attach import active, adapt, attach, attached, build, by_token, names, remove, rows, trainable, use, using
from weft.adapters.combine import Kept, combine
from weft.adapters.combine_factors import combine_factors
from weft.adapters.convert import convert
from weft.adapters.files import load, read_config, save
from weft.adapters.merge import merge, unmerge
from weft.adapters.summary import Summary, summary

__all__ = [
    "Kept",
    "Summary",
    "active",
    "adapt",
    "attach",
    "attached",
    "build",
    "by_token",
    "combine",
    "combine_factors",
    "convert",
    "load",
    "merge",
    "names",
    "read_config",
    "remove",
    "rows",
    "save",
    "summary",
    "trainable",
    "unmerge",
    "use",
    "using",
]
