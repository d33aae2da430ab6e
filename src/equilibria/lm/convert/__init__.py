"""Make runs of this library from weights that other codes have published.

Each format has one file, with a table that gives the name of every tensor here and there.
"""

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
