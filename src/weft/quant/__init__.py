"""Frozen-base formats: a weight as a few plain tensors, layers that hold them, and one question asked of all: `dense(layer)`."""

from weft.quant import bitsandbytes, eight_bit, four_bit, mxfp4
from weft.quant.base import BASES, parse_base
from weft.quant.convert import Packing, QuantReport, bits, candidates, install, packable, quantise_, relative_error, roundtrip
from weft.quant.decoding import Decoding
from weft.quant.experts import projections, routable, routed
from weft.quant.formats import FORMATS, Format, format_of, writable
from weft.quant.layers import Quantised, QuantLinear, computing, dense, is_quantised, settle, unpack_

__all__ = [
    "BASES",
    "FORMATS",
    "Decoding",
    "Format",
    "Packing",
    "QuantLinear",
    "QuantReport",
    "Quantised",
    "bits",
    "bitsandbytes",
    "candidates",
    "computing",
    "dense",
    "eight_bit",
    "format_of",
    "four_bit",
    "install",
    "is_quantised",
    "mxfp4",
    "packable",
    "parse_base",
    "projections",
    "quantise_",
    "relative_error",
    "roundtrip",
    "routable",
    "routed",
    "settle",
    "unpack_",
    "writable",
]
