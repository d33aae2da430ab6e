"""Stream and Corpus: the tokens on which a model is trained, validated and tested.

Letters: L length of a stream of tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from equilibria.checks import range_of
from equilibria.lm.corpora.vocabulary import Vocabulary

Unit = Literal["word", "character", "bpe", "symbol"]
"""The unit of a token: as of ``TextUnit``, or a symbol of a synthetic task."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A sequence of tokens with one target per token: the next token (text), or the answer of the task."""

    tokens: Int[Tensor, " L"]
    """The model's input (int64)."""
    targets: Int[Tensor, " L"]
    """The right answers at the same positions (int64)."""
    episode: int | None = None
    """Length in tokens of the independent sequences in the stream; None for one continuous text."""
    answers: int | None = None
    """The last so many targets of each episode are what the task asks for, and accuracy counts them; None for all."""

    def __post_init__(self) -> None:
        for name in ("tokens", "targets"):
            value: Tensor = getattr(self, name)
            if value.ndim != 1 or value.dtype != torch.int64:
                raise ValueError(
                    f"Stream({name}={value.dtype} of shape {list(value.shape)}): ids are a torch.int64 tensor with one "
                    f"axis; try {name}.flatten().long()."
                )
        if len(self.tokens) != len(self.targets) or not len(self.tokens):
            raise ValueError(
                f"Stream: {len(self.tokens)} tokens and {len(self.targets)} targets, and there must be one target per "
                "token and at least one token; Stream.of_text makes both from one sequence of ids."
            )
        if self.episode is not None and (self.episode < 1 or len(self.tokens) % self.episode):
            raise ValueError(
                f"Stream(episode={self.episode}): the {len(self.tokens)} tokens must be a whole number of episodes of "
                "at least 1 token; give the length of one independent sequence, or None for continuous text."
            )
        if self.answers is not None and not 1 <= self.answers <= (self.episode or 0):
            raise ValueError(
                f"Stream(episode={self.episode}, answers={self.answers}): the answers are the last targets of an "
                "episode, from 1 to all of them; give such a number, or None for all (and for continuous text)."
            )

    @classmethod
    def of_text(cls, ids: Int[Tensor, " N"]) -> Stream:
        """The stream in which the target of each token is the next token.

        Raises:
            ValueError: the text has fewer than two tokens.
        """
        if len(ids) < 2:
            raise ValueError(
                f"Stream.of_text: the text has {len(ids)} token(s), and needs at least 2, since each target is the "
                "next token; give a longer text."
            )
        return cls(tokens=ids[:-1], targets=ids[1:])

    @property
    def ids(self) -> Int[Tensor, " N"]:
        """The ids that ``of_text`` received: the first token and all targets."""
        return torch.cat([self.tokens[:1], self.targets])

    def __len__(self) -> int:
        """Number of targets, all of which can be scored."""
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Three streams over one vocabulary."""

    name: str
    """The name in reports."""
    train: Stream
    """The stream for training."""
    valid: Stream
    """The stream for validation: for choosing models and settings."""
    test: Stream
    """The stream for the test: for the final score only."""
    vocabulary: Vocabulary
    """The tokens of the ids."""
    unit: Unit
    """The unit of a token; reports give bits per character for characters and perplexity for words and BPE tokens."""

    def __post_init__(self) -> None:
        for split in ("train", "valid", "test"):
            stream: Stream = getattr(self, split)
            for name, ids in (("tokens", stream.tokens), ("targets", stream.targets)):
                low, high = range_of(ids)
                if low < 0 or high >= len(self.vocabulary):
                    raise ValueError(
                        f"Corpus {self.name!r}: the {name} of {split} hold the id {low if low < 0 else high}, and its "
                        f"vocabulary has the ids 0 … {len(self.vocabulary) - 1}; encode all three with that vocabulary."
                    )

    @property
    def spelling(self) -> Vocabulary | None:
        """The vocabulary if the ids spell a text; None for a synthetic task, whose symbols have no bytes."""
        return None if self.unit == "symbol" else self.vocabulary
