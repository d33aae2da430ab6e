"""The values that a ``TrellisCell`` computes once per solve, and its memory and cache.

Letters: B batch, T time, E channels of the input, H channels of h and of c. H2 = 2·H, H4 = 4·H, E2 = 2·E.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisMemory:
    """The past of the streams, detached: one position, however long the text was."""

    z: Float[Tensor, "B 1 H2"]
    """h and c at the last time."""
    x: Float[Tensor, "B 1 E"] | None
    """The input at that time; None if it is not carried over."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisWeights:
    """Values that depend on the parameters alone, with graph; columns for time t − 1 come before those for t."""

    state: Float[Tensor, "H4 H2"]
    input: Float[Tensor, "H4 E2"]
    bias: Float[Tensor, " H4"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisCache:
    """The past of the streams for generation: a tree of tensors with the batch first, and no weights in it."""

    memory: TrellisMemory
    padding: Int[Tensor, " B"] | None
    """Number of coming times before the text of each stream begins; None without padding."""
    warm: bool
    """True if a single position starts from the state of the one before it."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisRows:
    """Values that each sample has of its own during a solve, with graph where they depend on parameters or input."""

    injection: Float[Tensor, "B T H4"]
    """X⁰ x_{t−1} + X¹ x_t + b; if T is 1 and there is a past, plus W⁰ ĥ_{−1}."""
    past_h: Float[Tensor, "B 1 H"]
    """ĥ_{−1}."""
    past_c: Float[Tensor, "B 1 H"]
    """c_{−1}."""
    drop: Float[Tensor, "B 1 H"] | None
    """D, the dropout mask of h."""
    valid: Float[Tensor, "B T 1"] | None
    """0 at padding, where f is 0; None if there is none."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisKept:
    """Values that ``start`` and ``remember`` read."""

    start: Float[Tensor, "B 1 H2"] | None
    """The first iterate, the same at all times; None for zero."""
    like: Float[Tensor, "B T H4"]
    """The injection, from which a start at zero takes its shape."""
    last: Float[Tensor, "B 1 E"] | None
    """x at the last time, for the memory; None if it is not carried over."""
    cache: TrellisCache | None
    """The cache that the cell was given."""
    past: Float[Tensor, "B 1 H2"]
    """h and c before the segment; zeros without a past."""


def last_of(
    x: Float[Tensor, "B T C"], before: Float[Tensor, "B 1 C"], valid: Float[Tensor, "B T 1"] | None
) -> Float[Tensor, "B 1 C"]:
    """x at the last time that is no padding; ``before`` in a row that is all padding."""
    if valid is None:
        return x[:, -1:]
    times = torch.arange(1, x.shape[1] + 1, device=x.device)
    index = (times * valid[..., 0].bool()).amax(dim=1)  # 0 in a row of padding
    every = torch.cat([before.to(x.dtype), x], dim=1)
    return every.take_along_dim(index[:, None, None], dim=1)


def valid_of(padding: Tensor | None, x: Tensor) -> Float[Tensor, "B T 1"] | None:
    """1 where the text of a stream has begun, 0 before; None without padding."""
    if padding is None:
        return None
    times = torch.arange(x.shape[1], device=x.device)
    return (times >= padding[:, None]).to(x.dtype)[..., None]
