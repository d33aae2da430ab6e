"""Segments: a stream in parallel rows, cut into the pieces that a model reads one after the other.

Letters: B rows (batch), T time within a segment.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor

from equilibria.lm.corpora.corpus import Stream


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """One piece of every row; it continues where the previous segment of the same rows ended, unless it is fresh."""

    tokens: Int[Tensor, "B T"]
    """What the model reads."""
    targets: Int[Tensor, "B T"]
    """What it should answer."""
    resets: bool
    """True where nothing comes before: the memory must be reset to None first."""
    epoch: int
    """How often the stream had been read to its end before."""
    index: int
    """Place in the epoch, from 0."""
    position: int
    """Place since the beginning of training, from 0: epoch · segments per epoch + index."""
    skip: int = 0
    """The first positions, which are read and not scored: the segment before has scored them."""

    @property
    def scored(self) -> int:
        """How many targets are scored: those of all rows, from position ``skip`` on."""
        return self.targets[:, self.skip :].numel()


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """B contiguous rows of a stream (a rank), read from left to right in segments of T tokens, for ever.

    The stream is cut to ``batch_size · world_size`` rows of equal length; row r's past is row r, so nothing is
    shuffled. The tokens left over, fewer than there are rows (times the episode), are never read, and the first tokens
    of a row see none before them: scores to be published are taken with one row, which loses neither. The last segment
    of an epoch is shorter where T does not divide the row, so means over segments are weighted by their tokens.

    With an ``overlap`` of O tokens nothing is remembered from segment to segment: each is fresh, begins T − O tokens
    after the one before, and reads the last O tokens of that anew, without scoring them ("effective history", Bai,
    Kolter and Koltun 2019). Deviation from their code: the first segment of a row is scored from its first token on,
    so that each target is scored exactly once, as without overlap.

    A stream of independent episodes gives rows of whole episodes and one episode a row as the segment, always fresh.

    ``Segments(…, position=p)`` yields exactly what ``Segments(…)`` yields after its first p segments: p is all that a
    resumed run needs to store.
    """

    stream: Stream
    """What is read."""
    _: dataclasses.KW_ONLY
    batch_size: int
    """Rows of this rank."""
    length: int | None = None
    """Tokens a segment; ignored when the stream has episodes, which have a length of their own."""
    overlap: int = 0
    """Tokens that a segment shares with the one before, in the place of a memory; 0 for memory."""
    rank: int = 0
    """Which process this is: it reads the rows rank · batch_size … (rank + 1) · batch_size − 1."""
    world_size: int = 1
    """How many processes share the stream."""
    position: int = 0
    """How many segments were read before."""

    def __post_init__(self) -> None:
        self._check_numbers()
        if self._row_length == 0:
            have, needed = len(self.stream) // (self.stream.episode or 1), "tokens" if self._continuous else "episodes"
            raise ValueError(
                f"Segments(batch_size={self.batch_size}, world_size={self.world_size}): {self._rows} rows take at "
                f"least {self._rows} {needed} and the stream has {have}; "
                + (
                    f"try batch_size={have // self.world_size}, or a longer stream."
                    if have >= self.world_size
                    else "give a longer stream, or fewer processes."
                )
            )

    def __len__(self) -> int:
        """Segments per epoch."""
        return 1 + max(0, -(-(self._row_length - self._length) // self._step))

    def __iter__(self) -> Iterator[Segment]:
        """The segments from ``position`` on, epoch after epoch."""
        return map(self.at, itertools.count(self.position))

    def one_epoch(self) -> Iterator[Segment]:
        """The segments from ``position`` to the end of its epoch: a whole epoch from position 0."""
        return itertools.islice(self, len(self) - self.position % len(self))

    def at(self, position: int) -> Segment:
        """The segment at a position, whatever was read before."""
        epoch, index = divmod(position, len(self))
        piece = slice(index * self._step, index * self._step + self._length)
        tokens, targets = self._table
        return Segment(
            tokens=tokens[:, piece].contiguous(),
            targets=targets[:, piece].contiguous(),
            resets=index == 0 or self.overlap > 0 or not self._continuous,
            epoch=epoch,
            index=index,
            position=position,
            skip=self.overlap if index else 0,
        )

    @property
    def _continuous(self) -> bool:
        return self.stream.episode is None

    @property
    def _rows(self) -> int:
        return self.batch_size * self.world_size

    @property
    def _row_length(self) -> int:
        """Tokens a row: a whole number of episodes, or of single tokens in continuous text."""
        whole = self.stream.episode or 1
        return len(self.stream) // whole // self._rows * whole

    @property
    def _length(self) -> int:
        """Tokens a segment."""
        length = self.stream.episode or self.length
        assert length is not None  # _check_numbers
        return length

    @property
    def _step(self) -> int:
        """Tokens from the beginning of a segment to that of the next."""
        return self._length - self.overlap

    @functools.cached_property
    def _table(self) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
        """This rank's rows of tokens and of targets: views of the stream."""
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

        def rows(ids: Tensor) -> Tensor:
            return ids[: self._rows * self._row_length].view(self._rows, self._row_length)[mine]

        return rows(self.stream.tokens), rows(self.stream.targets)

    def _check_numbers(self) -> None:
        for name, least in (("batch_size", 1), ("world_size", 1), ("position", 0), ("overlap", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"Segments({name}={value}): it must be at least {least}; try {name}={least}.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"Segments(rank={self.rank}, world_size={self.world_size}): ranks are 0 … {self.world_size - 1}; "
                "give each process its own rank and all the same world_size."
            )
        if self._continuous and (self.length is None or self.length < 1):
            raise ValueError(
                f"Segments(length={self.length}): continuous text is cut into segments of at least 1 token; "
                "try length=64."
            )
        if self.overlap and not self._continuous:
            raise ValueError(
                f"Segments(overlap={self.overlap}): each segment is a whole episode, and episodes share nothing; "
                "give overlap=0."
            )
        if self.overlap >= self._length:
            raise ValueError(
                f"Segments(overlap={self.overlap}): segments of {self._length} tokens share less than that with the "
                f"one before; give at most {self._length - 1}, or 0 for none."
            )
