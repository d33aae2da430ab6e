"""Embedding: tokens to vectors.

Letters: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.layers.dropout import BatchSlice, check_rate, dropout_mask, masked

Dropped = Literal["channel", "token"]
Init = Literal["normal", "uniform"]


def started(tensor: Tensor, *, std: float, init: Init = "normal") -> Tensor:
    """The tensor, filled in place from N(0, std²), or from U(−√3·std, √3·std), which has the same variance.

    Raises:
        ValueError: ``init`` is neither "normal" nor "uniform".
    """
    if init not in ("normal", "uniform"):
        raise ValueError(f"init={init!r}: tables start from a 'normal' or a 'uniform' distribution; try 'normal'.")
    bound = math.sqrt(3) * std
    return nn.init.normal_(tensor, std=std) if init == "normal" else nn.init.uniform_(tensor, -bound, bound)


def dropped(
    x: Float[Tensor, "B T D"],
    *,
    rate: float,
    training: bool,
    kind: Dropped = "channel",
    part: BatchSlice | None = None,
) -> Float[Tensor, "B T D"]:
    """x ⊙ mask; in training the mask is 0 for a random share of the channels, or of the positions.

    Args:
        x: vectors of B streams.
        rate: the share that is dropped, 0 ≤ rate < 1; the rest is multiplied by 1/(1 − rate).
        training: the module's mode; in evaluation nothing is dropped.
        kind: "channel" for masks of shape (B, 1, D), "token" for masks of shape (B, T, 1).
        part: position of this batch inside a larger one; see ``BatchSlice``.
    """
    batch, time, width = x.shape
    shape = (batch, 1, width) if kind == "channel" else (batch, time, 1)
    return masked(x, dropout_mask(shape, rate=rate, training=training, like=x, part=part))


def words_dropped(
    rows: Float[Tensor, "*tokens D"],
    tokens: Int[Tensor, "*tokens"],
    *,
    rate: float,
    training: bool,
    vocabulary_size: int,
) -> Float[Tensor, "*tokens D"]:
    """The vectors with, in training, those of a random share of all words set to 0 (Gal and Ghahramani 2016, §4.2).

    A word is dropped at all its occurrences or at none. One number per word is drawn and looked up, so the table is
    neither changed nor copied; Merity, Keskar and Socher (2017, §4.3) copy it.

    Args:
        rows: the vectors of the tokens.
        tokens: the tokens.
        rate: the share that is dropped, 0 ≤ rate < 1; the rest is multiplied by 1/(1 − rate).
        training: the module's mode; in evaluation nothing is dropped.
        vocabulary_size: V, number of words.
    """
    mask = dropout_mask((vocabulary_size, 1), rate=rate, training=training, like=rows, rows=None)
    return masked(rows, None if mask is None else functional.embedding(tokens, mask))


def widened(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x in float32 or wider, for losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Embedding(nn.Embedding):
    """Rows of a learned table times √D (Vaswani et al. 2017, §3.4), with whole words and whole channels dropped.

    Args:
        vocabulary_size: V, rows of the table.
        width: D, width of the vectors.
        dropout: share of the channels that is dropped, the same channels at all positions of a segment.
        std: initial standard deviation of the table.
        word_dropout: share of the words that is dropped, each at all its occurrences; a tied head still sees them.
        scaled: multiply the vectors by √D.
        init: draw the table from N(0, std²) ("normal") or from U(±√3·std) ("uniform").
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        dropout: float = 0.0,
        std: float = 0.01,
        word_dropout: float = 0.0,
        scaled: bool = True,
        init: Init = "normal",
    ) -> None:
        check_rate("Embedding", "dropout", dropout)
        check_rate("Embedding", "word_dropout", word_dropout)
        if vocabulary_size < 1:
            raise ValueError(f"Embedding(vocabulary_size={vocabulary_size}): a vocabulary has at least one token.")
        super().__init__(vocabulary_size, width, _weight=torch.empty(vocabulary_size, width))
        self.dropout, self.word_dropout, self.scale = dropout, word_dropout, math.sqrt(width) if scaled else 1.0
        self.std = std
        self.init: Init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table again."""
        started(self.weight, std=self.std, init=self.init)

    def forward(self, input: Int[Tensor, "B T"], part: BatchSlice | None = None) -> Float[Tensor, "B T D"]:
        """E[input]·√D ⊙ masks, where ``input`` are tokens; ``part``: see ``BatchSlice``."""
        tokens, rows = input, functional.embedding(input, self.weight) * self.scale
        choices = {"rate": self.word_dropout, "training": self.training, "vocabulary_size": self.vocabulary_size}
        return dropped(words_dropped(rows, tokens, **choices), rate=self.dropout, training=self.training, part=part)

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return len(self.weight)

    def extra_repr(self) -> str:
        """Sizes and dropout rates."""
        sizes = f"vocabulary_size={self.vocabulary_size}, width={self.weight.shape[1]}"
        return f"{sizes}, dropout={self.dropout}, word_dropout={self.word_dropout}"
