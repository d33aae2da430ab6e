"""What a ``TrellisCell`` computes once per solve, and what it remembers of one segment for the next.

Letters: B batch, T time, E channels of the input, H channels of h and of c. H2 = 2·H, H4 = 4·H, E2 = 2·E.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisMemory:
    """The past of the streams, detached: one column, however long the text was."""

    z: Float[Tensor, "B 1 H2"]
    """h and c at the last time."""
    x: Float[Tensor, "B 1 E"] | None
    """The input there; None where it is not carried on."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisWeights:
    """What depends on the parameters alone, with graph; the columns of the past stand before those of the present."""

    state: Float[Tensor, "H4 H2"]
    input: Float[Tensor, "H4 E2"]


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisCache:
    """The past of the streams for generation: a tree of tensors with the batch first, and no weights in it."""

    memory: TrellisMemory
    padding: Int[Tensor, " B"] | None
    """Times to come before the text of each row begins; None without any."""
    warm: bool
    """True if a single position starts from the state of the one before it."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisRows:
    """What each sample has of its own during a solve, with graph where it depends on parameters or input."""

    injection: Float[Tensor, "B T H4"]
    """u_t + b; where T is 1 also W⁰ ĥ_{−1}."""
    past_h: Float[Tensor, "B 1 H"]
    """ĥ_{−1}."""
    past_c: Float[Tensor, "B 1 H"]
    """c_{−1}."""
    drop: Float[Tensor, "B 1 H"] | None
    """D, the dropout mask of h."""
    valid: Float[Tensor, "B T 1"] | None
    """0 at times before the text of a row begins, where f is 0; None without any."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisKept:
    """What ``start`` and ``remember`` read."""

    start: Float[Tensor, "B 1 H2"] | None
    """The first iterate, the same at all times; None for zero."""
    like: Float[Tensor, "B T H4"]
    """The injection, which gives the shape of a start at zero."""
    last: Float[Tensor, "B 1 E"] | None
    """x at the last time, as it is remembered."""
    cache: TrellisCache | None
    """As it came."""
