"""Cells: one architecture a file, a frozen Shape and the Module that it builds.

``CELLS`` is the catalogue: a small shape of each kind and variant, each of which enters the conformance suite.
"""

from equilibria.cells.affine import AffineCell, AffineContext, AffineShape
from equilibria.cells.transformer import TransformerCell, TransformerContext, TransformerMemory, TransformerShape

CELLS: tuple[AffineShape | TransformerShape, ...] = (
    AffineShape(width=8),
    TransformerShape(width=8, heads=2, inner=12, memory=5),
    TransformerShape(width=8, heads=2, inner=12, memory=16, positions="decay", longest=32),
    TransformerShape(width=8, heads=2, inner=12, memory=16, norm="pre", init="normal"),
    TransformerShape(width=8, heads=1, inner=12, memory=16, norm="pre-normalised", weight_norm=False),
    TransformerShape(width=12, heads=3, inner=8, memory=16, positions="decay", window=4),
    TransformerShape(width=8, heads=4, inner=12, memory=16, window=3, dropout=0.2, attention_dropout=0.1),
)

__all__ = [
    "CELLS",
    "AffineCell",
    "AffineContext",
    "AffineShape",
    "TransformerCell",
    "TransformerContext",
    "TransformerMemory",
    "TransformerShape",
]
