"""Cells: one architecture a file, a frozen Shape and the Module that it builds.

``CELLS`` is the catalogue: a small shape of each kind and variant, each of which enters the conformance suite.
"""

from equilibria.cells.affine import AffineCell, AffineContext, AffineShape
from equilibria.cells.chain import ChainCell, ChainContext, ChainShape
from equilibria.cells.transformer import TransformerCell
from equilibria.cells.transformer_context import TransformerCache, TransformerContext, TransformerMemory
from equilibria.cells.transformer_shape import TransformerShape
from equilibria.cells.trellis import TrellisCell
from equilibria.cells.trellis_context import TrellisCache, TrellisContext, TrellisMemory
from equilibria.cells.trellis_shape import TrellisShape

CELLS: tuple[AffineShape | TransformerShape | ChainShape | TrellisShape, ...] = (
    AffineShape(width=8),
    TransformerShape(width=8, heads=2, inner=12, memory=5),
    TransformerShape(width=8, heads=2, inner=12, memory=16, positions="decay", longest=32),
    TransformerShape(width=8, heads=2, inner=12, memory=16, norm="pre", init="normal"),
    TransformerShape(width=8, heads=1, inner=12, memory=16, norm="pre-normalised", weight_norm=False),
    TransformerShape(width=12, heads=3, inner=8, memory=16, positions="decay", window=4),
    TransformerShape(width=8, heads=4, inner=12, memory=16, window=3, dropout=0.2, attention_dropout=0.1),
    TransformerShape(
        width=8, heads=2, inner=12, memory=16, affine=True, attention_norm=True, variational=False, dropout=0.2
    ),
    ChainShape(
        cells=(
            TransformerShape(width=8, heads=2, inner=12, memory=16),
            TransformerShape(width=8, heads=1, inner=16, memory=16, positions="decay", longest=32),
        )
    ),
    TrellisShape(width=6, hidden=5, outputs=4),
    TrellisShape(width=4, hidden=3, outputs=4, recurrence="scan", weight_norm=False, injection_init="normal"),
    TrellisShape(width=4, hidden=4, outputs=2, dropout=0.2, weight_dropout=0.3),
    TrellisShape(width=4, hidden=4, outputs=2, dropout=0.2, weight_dropout=0.3, recurrence="scan"),
)

__all__ = [
    "CELLS",
    "AffineCell",
    "AffineContext",
    "AffineShape",
    "ChainCell",
    "ChainContext",
    "ChainShape",
    "TransformerCache",
    "TransformerCell",
    "TransformerContext",
    "TransformerMemory",
    "TransformerShape",
    "TrellisCache",
    "TrellisCell",
    "TrellisContext",
    "TrellisMemory",
    "TrellisShape",
]
