"""Variational dropout: masks drawn once per forward pass and constant during the solve.

A mask drawn inside f would make f another map at every call, and no map has a fixed point then (Gal and Ghahramani
2016 share one mask over time for other reasons; here it is shared over the iterations of the solver too).

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
    """The rows ``first``, ``first`` + 1, … of a batch of ``total``."""

    first: int
    total: int


def batch_draw(
    draw: Callable[[Sequence[int]], Tensor], shape: Sequence[int], *, part: BatchSlice | None, rows: int = 0
) -> Tensor:
    """The random tensor ``draw(shape)`` of a batch, or of one part of it.

    Args:
        draw: gives random numbers of a shape.
        shape: of the tensor that comes back.
        part: which rows of the whole batch these are; None for a batch of its own.
        rows: the axis of the samples.
    """
    if part is None:
        return draw(shape)
    whole = draw([*shape[:rows], part.total, *shape[rows + 1 :]])
    return whole.narrow(rows, part.first, shape[rows]).clone()  # a view would keep all of it


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
        shape: with a 1 where the mask is shared, as in (B, 1, D) for whole channels.
        rate: the share that is dropped, 0 ≤ rate < 1.
        training: the module's mode; in evaluation nothing is dropped.
        like: gives dtype and device.
        rows: the axis of the samples; None for a mask that all of them share.
        part: which rows of the whole batch these are.
    """
    if rate == 0 or not training:
        return None
    kept = 1 - rate

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(kept).div_(kept)

    return draw(shape) if rows is None else batch_draw(draw, shape, part=part, rows=rows)


def masked(x: Float[Tensor, "*shape"], mask: Tensor | None) -> Float[Tensor, "*shape"]:
    """x ⊙ mask, or x where there is no mask."""
    return x if mask is None else x * mask


def add_masked(x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], mask: Tensor | None) -> Float[Tensor, "*shape"]:
    """x + y ⊙ mask in one pass over the memory."""
    return x + y if mask is None else torch.addcmul(x, y, mask)


def check_rate(owner: str, name: str, rate: float) -> None:
    """Raise a ValueError unless 0 ≤ rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{owner}({name}={rate}): a dropout rate is a share, 0 ≤ {name} < 1; try 0.1, or 0 for none.")
