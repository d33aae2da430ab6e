"""The values that a ``TransformerCell`` computes once per solve.

Letters: B batch, T time, M memory, D width, I inner width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from equilibria.cells.transformer.attention import AttentionRows, AttentionWeights
from equilibria.cells.transformer.cache import KeyValueCache
from equilibria.cells.transformer.past import TransformerPast
from equilibria.layers.matrices import LinearWeights


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerWeights:
    """Values that depend on the parameters alone, with graph."""

    attention: AttentionWeights
    inner: LinearWeights
    """Effective weights [I D] and bias of the feed-forward network's first matrix."""
    outer: LinearWeights
    """Effective weights [D I] and bias of its second matrix."""


@dataclasses.dataclass(frozen=True, eq=False)
class PastRead:
    """The values that attention reads besides the segment itself."""

    weights: TransformerWeights
    past: Float[Tensor, "2 H B M C"] | KeyValueCache | None
    """Keys and values of past positions, the keys turned."""
    first: int
    """Position of the first row of the segment, counted as for the keys of the past."""
    key_padding_mask: Bool[Tensor, "B K"] | None
    """True at padding, in the past and in the segment; None if there is none."""
    table: Tensor | None = None
    """The table of positions for these distances or more; None to compute it."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerShared:
    """Values that all samples share during a solve."""

    weights: TransformerWeights
    attention: Any
    """The shared part of the attention."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerRows:
    """Values that each sample has of its own during a solve, with graph where they depend on the input."""

    attention: AttentionRows
    drop_attention: Float[Tensor, "B _ D"] | None
    """Dropout masks: of the attention output, of the inner layer, of the feed-forward output."""
    drop_inner: Float[Tensor, "B _ I"] | None
    drop_outer: Float[Tensor, "B _ D"] | None
    valid: Float[Tensor, "B T 1"] | None
    """0 at padding, where f is 0; None if there is none."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerKept:
    """Values that ``start`` and ``remember`` read."""

    start: Float[Tensor, "B T D"]
    """The first iterate."""
    injection: Float[Tensor, "B T 3*D"] | None
    """U, detached, for the memory."""
    weights: TransformerWeights
    memory: TransformerPast | None
    """The memory or cache that the cell was given."""
    key_padding_mask: Bool[Tensor, "B K"] | None
    """True at padding, in memory and segment; None if there is none."""
