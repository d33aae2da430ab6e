"""Tokens to vectors.

Letters: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.cells.masks import check_rate, dropout_mask, masked


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
        rows = functional.embedding(tokens, self.weight)
        shape = (rows.shape[0], 1, rows.shape[2])
        mask = dropout_mask(shape, rate=self.dropout, training=self.training, like=rows)
        return masked(rows * self.scale, mask)

    def extra_repr(self) -> str:
        """Sizes and rate."""
        return f"vocabulary_size={len(self.weight)}, width={self.weight.shape[1]}, dropout={self.dropout}"
