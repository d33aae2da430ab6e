"""Variational dropout: masks drawn once per forward pass and constant during the solve.

A mask drawn inside f would make f a different map at every call, and an iteration of it has no fixed point (Gal and
Ghahramani 2016 share one mask over time for other reasons; here the iterations of the solver share it, too).

A batch may be computed in parts, on several processes or one after the other. Every part then draws for the whole batch
from the same state of the generator and keeps its own rows: the result is that of one process, whatever the number of
parts, and a run can be resumed with another number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BatchSlice:
    """The rows ``first``, ``first`` + 1, … of a batch of ``total`` rows."""

    first: int
    total: int


def batch_draw(
    draw: Callable[[Sequence[int]], Tensor], shape: Sequence[int], *, part: BatchSlice | None, rows: int = 0
) -> Tensor:
    """The random tensor ``draw(shape)`` of a batch, or of one part of it.

    Args:
        draw: returns random numbers of a given shape.
        shape: the shape of the result.
        part: the rows of the whole batch to return; None if the batch is not divided.
        rows: the axis of the samples.
    """
    if part is None:
        return draw(shape)
    whole = draw([*shape[:rows], part.total, *shape[rows + 1 :]])
    return whole.narrow(rows, part.first, shape[rows]).clone()  # a view would keep the whole batch alive


def dropout_mask(
    shape: Sequence[int],
    *,
    rate: float,
    training: bool,
    like: Tensor,
    rows: int | None = 0,
    part: BatchSlice | None = None,
) -> Float[Tensor, "..."] | None:
    """A mask of ``shape`` with entries 0 (probability ``rate``) or 1/(1 − rate); None where nothing is dropped.

    Args:
        shape: the shape of the mask, with 1 for axes along which it is constant, as in (B, 1, D) for whole channels.
        rate: the probability of dropping an entry, 0 ≤ rate < 1.
        training: the mode of the module; in evaluation nothing is dropped.
        like: gives dtype and device.
        rows: the axis of the samples; None for a mask that all of them share.
        part: the rows of the whole batch to return.
    """
    if rate == 0 or not training:
        return None
    kept = 1 - rate

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(kept).div_(kept)

    return draw(shape) if rows is None else batch_draw(draw, shape, part=part, rows=rows)


def masked(x: Float[Tensor, "*shape"], mask: Tensor | None) -> Float[Tensor, "*shape"]:
    """x ⊙ mask, or x if there is no mask."""
    return x if mask is None else x * mask


def add_masked(x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], mask: Tensor | None) -> Float[Tensor, "*shape"]:
    """x + y ⊙ mask in one pass over the memory."""
    return x + y if mask is None else torch.addcmul(x, y, mask)


def check_rate(owner: str, name: str, rate: float) -> None:
    """Raise a ValueError unless 0 ≤ rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{owner}({name}={rate}): a dropout rate is a share, 0 ≤ {name} < 1; try 0.1, or 0 for none.")
