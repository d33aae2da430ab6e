"""Random numbers of a batch that is computed in parts, on several processes or one after the other.

Every part draws for the whole batch from the same state of the generator, and keeps its own rows: the result is that of
one process, whatever the number of parts, and a run can go on with another number.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows ``first``, ``first`` + 1, … of a batch of ``total``."""

    first: int
    total: int


_PART: contextvars.ContextVar[Part | None] = contextvars.ContextVar("part of the batch", default=None)


@contextlib.contextmanager
def part_of_batch(part: Part | None) -> Iterator[None]:
    """What is drawn within is for this part of a batch; for a batch of its own with None."""
    before = _PART.set(part)
    try:
        yield
    finally:
        _PART.reset(before)


def drawn(draw: Callable[[Sequence[int]], Tensor], shape: Sequence[int], *, rows: int = 0) -> Tensor:
    """``draw(shape)``, where axis ``rows`` counts samples."""
    part = _PART.get()
    if part is None:
        return draw(shape)
    whole = draw([*shape[:rows], part.total, *shape[rows + 1 :]])
    return whole.narrow(rows, part.first, shape[rows]).clone()  # so that the whole one is let go
