"""Tokens to vectors.

Letters: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.cells.masks import check_rate, dropout_mask, masked

Dropped = Literal["channel", "token"]


def dropped(
    x: Float[Tensor, "B T D"], *, rate: float, training: bool, kind: Dropped = "channel"
) -> Float[Tensor, "B T D"]:
    """x ⊙ mask, which in training is 0 for a share of the channels, or of the positions.

    Args:
        x: vectors of B streams.
        rate: this share, 0 ≤ rate < 1; what is kept is multiplied by 1/(1 − rate).
        training: the module's mode; in evaluation nothing is dropped.
        kind: "channel" for masks of shape (B, 1, D), "token" for masks of shape (B, T, 1).
    """
    batch, time, width = x.shape
    shape = (batch, 1, width) if kind == "channel" else (batch, time, 1)
    return masked(x, dropout_mask(shape, rate=rate, training=training, like=x))


class Embedding(nn.Module):
    """Rows of a learned table times √D (Vaswani et al. 2017, §3.4), with whole channels dropped.

    Args:
        vocabulary_size: V, rows of the table.
        width: D, their length.
        dropout: share of the channels that is dropped, the same ones at all positions of a segment.
        std: the table starts from N(0, std²).
    """

    def __init__(self, *, vocabulary_size: int, width: int, dropout: float = 0.0, std: float = 0.01) -> None:
        super().__init__()
        check_rate("Embedding", "dropout", dropout)
        if vocabulary_size < 1:
            raise ValueError(f"Embedding(vocabulary_size={vocabulary_size}): a vocabulary has at least one token.")
        self.dropout, self.scale = dropout, math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(vocabulary_size, width).normal_(std=std))

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """E[tokens]·√D ⊙ mask."""
        rows = functional.embedding(tokens, self.weight) * self.scale
        return dropped(rows, rate=self.dropout, training=self.training)

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return len(self.weight)

    def extra_repr(self) -> str:
        """Sizes and rate."""
        return f"vocabulary_size={self.vocabulary_size}, width={self.weight.shape[1]}, dropout={self.dropout}"
