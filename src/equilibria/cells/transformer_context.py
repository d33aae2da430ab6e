"""What a ``TransformerCell`` computes once per solve, and what it remembers of one segment for the next.

Letters: B batch, T time, M memory, D width, I inner width.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from equilibria.cells.attention import AttentionContext, AttentionWeights
from equilibria.cells.cache import KeyValueCache


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerMemory:
    """The past of the streams, detached: the state and the injection at the same M positions."""

    z: Float[Tensor, "B M D"]
    u: Float[Tensor, "B M 3*D"] | None
    """None where nothing is injected."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerWeights:
    """What depends on the parameters alone, with graph."""

    attention: AttentionWeights
    inner: Float[Tensor, "I D"]
    """Effective weights of the feed-forward network."""
    outer: Float[Tensor, "D I"]


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerCache:
    """The past of the streams for generation: keys and values in slots, and all that no token changes."""

    past: KeyValueCache
    weights: TransformerWeights
    table: Tensor
    """That of the positions, for all distances that one new position can have to the past."""
    last: Float[Tensor, "B 1 D"] | None
    """The state at the last position, from which the next one starts; None for a start at zero."""
    warm: bool
    """Whether there is to be one."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerContext:
    """What is constant during a solve, with graph where it depends on parameters or input."""

    weights: TransformerWeights
    attention: AttentionContext
    start: Float[Tensor, "B T D"]
    """The first iterate."""
    injection: Float[Tensor, "B T 3*D"] | None
    """U as it is remembered."""
    drop_attention: Float[Tensor, "B _ D"] | None
    """Dropout masks: of the attention output, of the inner layer, of the feed-forward output."""
    drop_inner: Float[Tensor, "B _ I"] | None
    drop_outer: Float[Tensor, "B _ D"] | None
    present: Float[Tensor, "B T 1"] | None
    """0 at positions before the text of a row begins, where f is 0; None without any."""
    memory: TransformerMemory | TransformerCache | None
    """As it came, for ``remember``."""
