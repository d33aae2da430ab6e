"""Weights that other codes have published, as runs of this library: one file per format, with its table of names."""

from equilibria.lm.convert.conversion import FORMATS, Conversion, convert, format_of
from equilibria.lm.convert.format import Format
from equilibria.lm.convert.numbering import Numbering, numbered
from equilibria.lm.convert.tensors import ConversionError, Tensors, read

__all__ = [
    "FORMATS",
    "Conversion",
    "ConversionError",
    "Format",
    "Numbering",
    "Tensors",
    "convert",
    "format_of",
    "numbered",
    "read",
]
