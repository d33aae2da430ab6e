"""Cells: one architecture per file or folder, a frozen configuration and the module that it builds.

``CELLS`` is the catalogue: a small configuration of each kind and variant, each of which enters the conformance suite.
"""

from equilibria.cells.affine import AffineCell, AffineConfig
from equilibria.cells.chain import ChainCell, ChainConfig
from equilibria.cells.transformer.cell import TransformerCell, TransformerConfig
from equilibria.cells.transformer.past import KeyValues, TransformerCache, TransformerMemory
from equilibria.cells.trellis.cell import TrellisCell, TrellisConfig
from equilibria.cells.trellis.prepared import TrellisCache, TrellisMemory

CELLS: tuple[AffineConfig | TransformerConfig | ChainConfig | TrellisConfig, ...] = (
    AffineConfig(width=8),
    TransformerConfig(width=8, heads=2, inner=12, memory=5),
    TransformerConfig(width=8, heads=2, inner=12, memory=16, positions="decay", longest=32),
    TransformerConfig(width=8, heads=2, inner=12, memory=16, norm="pre", init="normal"),
    TransformerConfig(width=8, heads=1, inner=12, memory=16, norm="pre-normalised", weight_norm=False),
    TransformerConfig(width=12, heads=3, inner=8, memory=16, positions="decay", window=4),
    TransformerConfig(width=8, heads=4, inner=12, memory=16, window=3, dropout=0.2, attention_dropout=0.1),
    TransformerConfig(
        width=8, heads=2, inner=12, memory=16, affine=True, attention_norm=True, variational=False, dropout=0.2
    ),
    TransformerConfig(width=8, heads=2, inner=12, memory=5, dropout=0.2, attention="fused"),
    TransformerConfig(width=12, heads=3, inner=8, memory=16, positions="decay", window=4, attention="fused"),
    TransformerConfig(width=8, heads=2, inner=12, memory=16, positions="rotary"),
    TransformerConfig(width=12, heads=3, inner=8, memory=16, positions="rotary", window=4, attention="fused"),
    ChainConfig(
        cells=(
            TransformerConfig(width=8, heads=2, inner=12, memory=16),
            TransformerConfig(width=8, heads=1, inner=16, memory=16, positions="decay", longest=32),
        )
    ),
    ChainConfig(
        cells=(
            TransformerConfig(width=8, heads=2, inner=12, memory=5, norm="pre", affine=True, attention_norm=True),
            TransformerConfig(width=8, heads=2, inner=12, memory=5, norm="post", dropout=0.2),
        ),
        memory="last",
    ),
    TrellisConfig(width=6, hidden=5, outputs=4),
    TrellisConfig(width=4, hidden=3, outputs=4, recurrence="scan", weight_norm=False, injection_init="normal"),
    TrellisConfig(width=4, hidden=4, outputs=2, dropout=0.2, weight_dropout=0.3),
    TrellisConfig(width=4, hidden=4, outputs=2, dropout=0.2, weight_dropout=0.3, recurrence="scan"),
)

CellConfig = TransformerConfig | ChainConfig | TrellisConfig
"""The configurations of cells on sequences, which experiments and their flags know by name."""

__all__ = [
    "CELLS",
    "AffineCell",
    "AffineConfig",
    "CellConfig",
    "ChainCell",
    "ChainConfig",
    "KeyValues",
    "TransformerCache",
    "TransformerCell",
    "TransformerConfig",
    "TransformerMemory",
    "TrellisCache",
    "TrellisCell",
    "TrellisConfig",
    "TrellisMemory",
]
