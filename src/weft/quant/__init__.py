"""Frozen-base formats: a weight as a few plain tensors, layers that hold them, and one question asked of all: `dense(layer)`."""

from weft.quant import four_bit
from weft.quant.convert import Packing, QuantReport, bits, candidates, install, packable, quantise_, relative_error, roundtrip
from weft.quant.formats import FORMATS, Format, format_of, writable
from weft.quant.layers import Decoding, Quantised, QuantLinear, computing, dense, is_quantised, settle

__all__ = [
    "FORMATS",
    "Decoding",
    "Format",
    "Packing",
    "QuantLinear",
    "QuantReport",
    "Quantised",
    "bits",
    "candidates",
    "computing",
    "dense",
    "format_of",
    "four_bit",
    "install",
    "is_quantised",
    "packable",
    "quantise_",
    "relative_error",
    "roundtrip",
    "settle",
    "writable",
]
