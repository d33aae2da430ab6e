"""The values that a ``TransformerCell`` computes once per solve, and its memory and cache.

Letters: B batch, T time, M memory, D width, I inner width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.cells.transformer.attention import AttentionRows, AttentionWeights
from equilibria.cells.transformer.cache import KeyValueCache


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerMemory:
    """The past of the streams, detached: the state and the injection at the same M positions."""

    z: Float[Tensor, "B M D"]
    u: Float[Tensor, "B M 3*D"] | None
    """None without an injection."""

    @classmethod
    def joined(cls, past: TransformerMemory | None, z: Tensor, u: Tensor | None, *, length: int) -> TransformerMemory:
        """The last ``length`` positions of the past and of a segment with state z and injection u, detached."""
        if past is not None and z.shape[1] < length:
            z = torch.cat([past.z, z], dim=1)
            u = None if u is None or past.u is None else torch.cat([past.u, u], dim=1)
        return cls(z=z[:, -length:], u=None if u is None else u[:, -length:])


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerCache:
    """The past of the streams for generation: a tree of tensors with the batch first, and no weights in it."""

    past: KeyValueCache
    """Keys and values in slots, one per position."""
    last: Float[Tensor, "B 1 D"] | None
    """The state at the last position, from which the next one starts; None for a start at zero."""
    warm: bool
    """True to store the last state for a warm start."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerWeights:
    """Values that depend on the parameters alone, with graph."""

    attention: AttentionWeights
    inner: Float[Tensor, "I D"]
    """Effective weights of the feed-forward network."""
    outer: Float[Tensor, "D I"]


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
    """0 at positions before the text of a stream begins, where f is 0; None if there are none."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerKept:
    """Values that ``start`` and ``remember`` read."""

    start: Float[Tensor, "B T D"]
    """The first iterate."""
    injection: Float[Tensor, "B T 3*D"] | None
    """U, detached, for the memory."""
    weights: TransformerWeights
    memory: TransformerMemory | TransformerCache | None
    """The memory or cache that the cell was given."""
