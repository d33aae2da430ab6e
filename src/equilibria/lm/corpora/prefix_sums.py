"""prefix-sums: at each position, is the number of ones so far odd? Longer sequences are harder in the same way.

Letters: E episodes, N length of an episode in tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from equilibria.checks import check_at_least, check_fields
from equilibria.lm.corpora.corpus import Corpus, Stream
from equilibria.lm.corpora.episodes import check_counts, drawn
from equilibria.lm.corpora.source import Source


def prefix_sums(*, length: int = 32, train: int = 20000, valid: int = 2000, test: int = 2000, seed: int = 0) -> Corpus:
    """Independent episodes of random bits x_1 … x_N, whose targets are the sums y_i = (x_1 + … + x_i) mod 2.

    A model with a local receptive field has to pass the sum on from position to position, so that an episode twice as
    long needs twice the steps: the task asks whether more computation in the test solves harder episodes.

    Reference: Schwarzschild et al. 2021, "Can you learn an algorithm? Generalizing from easy to hard problems with
    recurrent networks"; Anil et al. 2022, "Path independent equilibrium models can better exploit test-time
    computation".

    Args:
        length: N, in tokens.
        train: number of episodes for training.
        valid: number of episodes for validation.
        test: number of episodes for the test.
        seed: seed of the bits; each set has its own draw, so the size of one does not change another.

    Raises:
        ValueError: a number is below 1.
    """
    check_counts("prefix_sums", "length=32, train=20000", length=length, train=train, valid=valid, test=test)

    def stream(episodes: int, generator: torch.Generator) -> Stream:
        bits = torch.randint(2, (episodes, length), generator=generator)
        return Stream(tokens=bits.flatten(), targets=(bits.cumsum(dim=1) % 2).flatten(), episode=length)

    return drawn(stream, name=f"prefix-sums-{length}", symbols="01", sizes=(train, valid, test), seed=seed)


@dataclasses.dataclass(frozen=True)
class PrefixSums(Source):
    """Random bits; the target at each position is the parity of all bits up to it: 1 if the number of ones is odd."""

    unit: ClassVar = "symbol"
    """The unit of a token."""
    chance: ClassVar = 1 / 2
    """A sum is odd or even."""
    length: int = 32
    """N: bits per sequence."""
    train: int = 20_000
    """Number of sequences for training."""
    valid: int = 2_000
    """Number of sequences for validation."""
    test: int = 2_000
    """Number of sequences for the test."""
    seed: int = 0
    """Seed of the sequences."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, length=1, train=1, valid=1, test=1)

    def load(self) -> Corpus:
        """The corpus; the same seed always gives the same sequences."""
        return prefix_sums(length=self.length, train=self.train, valid=self.valid, test=self.test, seed=self.seed)

    def memoryless_nll(self) -> float:
        """(N − 1) / N · ln 2: without the bits before it, every sum but the first is a guess."""
        return (self.length - 1) / self.length * math.log(2)
