"""copying: the copy-memory task. Ten symbols have to be recalled after a long blank.

Letters: E episodes, T length of the blank; an episode has T + 20 tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from equilibria.checks import check_at_least, check_fields
from equilibria.lm.corpora.corpus import Corpus, Stream
from equilibria.lm.corpora.episodes import check_counts, drawn
from equilibria.lm.corpora.source import Source

SYMBOLS = 10
"""Number of symbols to recall: the last targets of each episode, the only ones that need memory."""
_KINDS = 8
"""The symbols to recall are 1 … 8; 0 is the blank, and 9 is the delimiter that asks for them."""


def copying(
    *,
    blank: int = 400,
    train: int = 20000,
    valid: int = 2000,
    test: int = 2000,
    variant: Literal["paper", "tcn"] = "paper",
    seed: int = 0,
) -> Corpus:
    """Independent episodes: symbols a_1 … a_10, a blank, a delimiter, and ten steps in which a has to be repeated.

    With a uniform on {1, …, 8} and T the length of the blank:

        tokens   a, 0 … 0 (T − 1 times), 9, then 0 ten times ("paper") or 9 ten times ("tcn")
        targets  0 … 0 (T + 10 times), a

    Reference: Bai, Kolter, Koltun 2019, appendix F ("paper"); Bai, Kolter, Koltun 2018 and its code ("tcn").

    Args:
        blank: T, in tokens.
        train: number of episodes for training.
        valid: number of episodes for validation.
        test: number of episodes for the test.
        variant: the tokens after the delimiter; both are equally hard for a causal model that knows positions.
        seed: seed of the symbols; each set has its own draw, so the size of one does not change another.

    Raises:
        ValueError: a number is below 1, or there is no such variant.
    """
    check_counts("copying", "blank=400, train=20000", blank=blank, train=train, valid=valid, test=test)
    if variant not in ("paper", "tcn"):
        raise ValueError(f"copying(variant={variant!r}): the variants are 'paper' and 'tcn'; try 'paper'.")

    def stream(episodes: int, generator: torch.Generator) -> Stream:
        symbols = torch.randint(1, _KINDS + 1, (episodes, SYMBOLS), generator=generator)
        return _episodes(symbols, blank=blank, after=0 if variant == "paper" else 9)

    return drawn(stream, name=f"copying-{blank}", symbols="0123456789", sizes=(train, valid, test), seed=seed)


def memoryless_optimum(blank: int) -> float:
    """The loss in nats per token of the best model without memory, 10 · ln 8 / (T + 20): 0.0495 at T = 400.

    The delimiter tells it when to answer; which of the eight symbols it was it can only guess.
    """
    return SYMBOLS * math.log(_KINDS) / (blank + 2 * SYMBOLS)


def _episodes(symbols: Int[Tensor, "E 10"], *, blank: int, after: int) -> Stream:
    """The stream of the episodes in which these symbols have to be recalled."""
    episodes, length = len(symbols), blank + 2 * SYMBOLS
    tokens = torch.zeros(episodes, length, dtype=torch.int64)
    tokens[:, :SYMBOLS] = symbols
    tokens[:, -SYMBOLS - 1] = 9
    tokens[:, -SYMBOLS:] = after
    targets = torch.zeros_like(tokens)
    targets[:, -SYMBOLS:] = symbols
    return Stream(tokens=tokens.flatten(), targets=targets.flatten(), episode=length, answers=SYMBOLS)


@dataclasses.dataclass(frozen=True)
class Copying(Source):
    """The copy-memory task: ten symbols, a long blank, and then the ten symbols have to be recalled."""

    unit: ClassVar = "symbol"
    """The unit of a token."""
    chance: ClassVar = 1 / _KINDS
    """The symbols to recall are of eight kinds."""
    blank: int = 400
    """T: steps between the symbols and their recall; a sequence has T + 20 steps."""
    train: int = 20_000
    """Number of sequences for training."""
    valid: int = 2_000
    """Number of sequences for validation."""
    test: int = 2_000
    """Number of sequences for the test."""
    variant: Literal["paper", "tcn"] = "paper"
    """One delimiter (Bai, Kolter, Koltun 2019, appendix F) or eleven (Bai, Kolter, Koltun 2018)."""
    seed: int = 0
    """Seed of the sequences."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, blank=1, train=1, valid=1, test=1)

    def load(self) -> Corpus:
        """The corpus; the same seed always gives the same sequences."""
        return copying(
            blank=self.blank,
            train=self.train,
            valid=self.valid,
            test=self.test,
            variant=self.variant,
            seed=self.seed,
        )

    def memoryless_nll(self) -> float:
        """``memoryless_optimum`` of the blank."""
        return memoryless_optimum(self.blank)
