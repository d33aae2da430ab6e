"""Segments: a text as B parallel streams, cut into the segments that a model reads one after the other.

Letters: B batch (parallel streams), T time within a segment, L length of a parallel stream.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor

from equilibria.checks import check_at_least, check_fields
from equilibria.lm.corpora.corpus import Stream


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """T tokens of each of B streams, which continue the previous segment unless it ``resets``."""

    tokens: Int[Tensor, "B T"]
    """The model's input."""
    targets: Int[Tensor, "B T"]
    """The right answers."""
    resets: bool
    """True if the streams begin here: the memory must be reset to None before this segment."""
    epoch: int
    """Number of complete passes over the text before this segment."""
    index: int
    """Index in the epoch, from 0."""
    position: int
    """Index since the beginning of training, from 0: epoch · segments per epoch + index."""
    skip: int = 0
    """Number of positions at the beginning that are read but not scored, since the previous segment scored them."""

    @property
    def scored(self) -> int:
        """Number of targets that are scored: B · (T − skip)."""
        return self.targets[:, self.skip :].numel()


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """An endless iterable of the segments of a text, epoch after epoch.

    The text is cut into ``batch_size · world_size`` contiguous parallel streams of equal length, which are read from
    left to right in segments of T tokens; nothing is shuffled. Tokens left over, fewer than there are streams (times
    the length of an episode), are never read, and the first tokens of a stream have no past. So scores to be published
    need ``batch_size=1``, which loses neither. The last segment of an epoch is shorter if T does not divide L, so means
    over segments have to be weighted by their tokens.

    With an ``overlap`` of O tokens there is no memory: each segment ``resets``, begins T − O tokens after the previous
    one, and reads the last O tokens of that again without scoring them ("effective history", Bai, Kolter and Koltun
    2019). Deviation from their code: the first segment of a stream is scored from its first token, so that each target
    is scored exactly once, as without overlap.

    With ``official`` the n tokens are divided into B rows of ⌊n / B⌋, and not the targets, as published scores have it:
    the first token of a row is no target, and with an overlap neither are the O tokens after it.

    Of independent episodes, each parallel stream contains whole ones, a segment is one episode per stream, and every
    segment ``resets``.

    ``Segments(…, position=p)`` yields exactly the segments that ``Segments(…)`` yields after its first p, so p is all
    that a resumed run has to store.

    Raises:
        ValueError: a number is out of its range, or the text is too short for the batch.
    """

    stream: Stream
    """The text, or the episodes."""
    _: dataclasses.KW_ONLY
    batch_size: int
    """Number of parallel streams of this rank."""
    length: int | None = None
    """Tokens per segment; ignored for episodes, whose segments are whole episodes."""
    overlap: int = 0
    """Tokens that a segment shares with the previous one, instead of a memory; 0 for memory."""
    rank: int = 0
    """Index of this process: it reads the streams rank · batch_size … (rank + 1) · batch_size − 1."""
    world_size: int = 1
    """Number of processes that share the text."""
    position: int = 0
    """Number of segments that were read before."""
    official: bool = False
    """Divide the tokens into rows first, as the published codes do, instead of the targets."""

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.official:
            self._check_official()
        if self._stream_length == 0:
            have, needed = len(self.stream) // (self.stream.episode or 1), "tokens" if self._continuous else "episodes"
            raise ValueError(
                f"Segments(batch_size={self.batch_size}, world_size={self.world_size}): {self._streams} streams need "
                f"at least {self._streams} {needed} and the text has {have}; "
                + (
                    f"try batch_size={have // self.world_size}, or a longer text."
                    if have >= self.world_size
                    else "give a longer text, or fewer processes."
                )
            )

    def __len__(self) -> int:
        """Number of segments per epoch."""
        return 1 + max(0, -(-(self._stream_length - self._length) // self._step))

    def __iter__(self) -> Iterator[Segment]:
        """The segments from ``position``, epoch after epoch, without end."""
        return map(self.at, itertools.count(self.position))

    def one_epoch(self) -> Iterator[Segment]:
        """The segments from ``position`` to the end of its epoch; a whole epoch if ``position`` is 0."""
        return itertools.islice(self, len(self) - self.position % len(self))

    def at(self, position: int) -> Segment:
        """The segment at ``position``, independent of the iteration."""
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
            skip=self.overlap if index or self.official else 0,
        )

    @property
    def _continuous(self) -> bool:
        return self.stream.episode is None

    @property
    def _streams(self) -> int:
        """Number of parallel streams of all ranks."""
        return self.batch_size * self.world_size

    @property
    def _stream_length(self) -> int:
        """L, targets per parallel stream: a whole number of episodes if there are episodes."""
        if self.official:
            return (len(self.stream) + 1) // self._streams - 1
        whole = self.stream.episode or 1
        return len(self.stream) // whole // self._streams * whole

    @property
    def _length(self) -> int:
        """Tokens per segment."""
        length = self.stream.episode or self.length
        assert length is not None  # _check_numbers
        return length

    @property
    def _step(self) -> int:
        """Tokens from the beginning of a segment to the beginning of the next."""
        return self._length - self.overlap

    @functools.cached_property
    def _table(self) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
        """Tokens and targets of this rank's streams, as views of the text."""
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        if self.official:
            length = self._stream_length + 1
            rows = self.stream.ids[: self._streams * length].view(self._streams, length)[mine]
            return rows[:, :-1], rows[:, 1:]

        def streams(ids: Tensor) -> Tensor:
            return ids[: self._streams * self._stream_length].view(self._streams, self._stream_length)[mine]

        return streams(self.stream.tokens), streams(self.stream.targets)

    def _check_official(self) -> None:
        if not self._continuous:
            raise ValueError(
                "Segments(official=True): whole episodes are read side by side, and there is nothing to divide; leave "
                "official out."
            )
        if self._stream_length <= self.overlap:
            raise ValueError(
                f"Segments(batch_size={self.batch_size}, overlap={self.overlap}, official=True): {self._streams} rows "
                f"of {len(self.stream) + 1} tokens leave no target to score; try a smaller batch_size."
            )

    def _check_numbers(self) -> None:
        check_fields(self)
        check_at_least(self, batch_size=1, world_size=1, position=0, overlap=0)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"Segments(rank={self.rank}, world_size={self.world_size}): ranks are 0 … {self.world_size - 1}; "
                "give each process its own rank and all processes the same world_size."
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
                f"Segments(overlap={self.overlap}): segments of {self._length} tokens share fewer than that with the "
                f"previous one; give at most {self._length - 1}, or 0 for none."
            )
