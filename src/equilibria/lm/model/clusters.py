"""Adaptive embedding: words are divided into clusters by frequency, and clusters of rare words have narrower vectors.

Letters: B batch, T time, N tokens, D width, V vocabulary, d_i width of cluster i.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.layers.dropout import BatchSlice, check_rate
from equilibria.layers.linear import linear
from equilibria.lm.model.tables import Init, dropped, started, words_dropped


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The tokens of one cluster."""

    positions: Int[Tensor, " n"]
    """Their indices among all tokens."""
    words: Int[Tensor, " n"]
    """Their ids inside the cluster, counted from 0."""


@dataclasses.dataclass(frozen=True)
class Clusters:
    """V words divided at the ``cutoffs``: cluster 0 begins with word 0, cluster i with the i-th cutoff."""

    cutoffs: tuple[int, ...]
    vocabulary_size: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of words in each cluster; the sum is V."""
        bounds = (0, *self.cutoffs, self.vocabulary_size)
        return tuple(high - low for low, high in itertools.pairwise(bounds))

    def of(self, tokens: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """The cluster of each token."""
        return torch.stack([tokens >= cutoff for cutoff in self.cutoffs]).sum(dim=0)

    def pieces(self, tokens: Int[Tensor, " N"]) -> list[Piece]:
        """The tokens of each cluster, possibly none; waits for the device once."""
        cluster = self.of(tokens)
        order = cluster.argsort(stable=True)
        counts = torch.bincount(cluster, minlength=len(self.cutoffs) + 1).tolist()
        pieces = zip(order.split(counts), tokens[order].split(counts), (0, *self.cutoffs), strict=True)
        return [Piece(positions=positions, words=words - first) for positions, words, first in pieces]


class AdaptiveEmbedding(nn.Module):
    """E_i[token] P_iᵀ √D for a token of cluster i (Baevski and Auli 2019, §3.1), with words and channels dropped.

    Table E_i has one row of width d_i = ⌊d_0/division^i⌋ per word of the cluster, and P_i (D × d_i) projects it to the
    model's width, also in cluster 0. With division 1 there is one table for all clusters, ``tables[0]``, and one
    projection, ``projections[0]``, if d_0 ≠ D.

    Every call uses every table and projection: where a cluster has no token, they get the gradient 0 and not None.

    Args:
        clusters: the clusters of the words.
        width: D, width of the returned vectors.
        widths: d_i, one per cluster.
        division: 1 for one table.
        dropout: share of the channels that is dropped, the same channels at all positions of a segment.
        std: initial standard deviation of the tables.
        projection_std: the projections start from N(0, projection_std²).
        word_dropout: share of the words that is dropped, as in ``Embedding``.
        scaled: multiply the vectors by √D.
        init: draw the tables from N(0, std²) ("normal") or from U(±√3·std) ("uniform").
    """

    def __init__(
        self,
        clusters: Clusters,
        *,
        width: int,
        widths: tuple[int, ...],
        division: int,
        dropout: float = 0.0,
        std: float = 0.01,
        projection_std: float = 0.01,
        word_dropout: float = 0.0,
        scaled: bool = True,
        init: Init = "normal",
    ) -> None:
        super().__init__()
        check_rate("AdaptiveEmbedding", "dropout", dropout)
        check_rate("AdaptiveEmbedding", "word_dropout", word_dropout)
        self.clusters, self.dropout, self.word_dropout = clusters, dropout, word_dropout
        self.scale = math.sqrt(width) if scaled else 1.0
        shapes = list(zip(clusters.sizes, widths, strict=True))
        if division == 1:
            shapes = [(clusters.vocabulary_size, widths[0])]
        projected = [d for _, d in shapes] if division > 1 or widths[0] != width else []
        self.std, self.projection_std = std, projection_std
        self.init: Init = init
        self.tables = nn.ParameterList([torch.empty(shape) for shape in shapes])
        self.projections = nn.ParameterList([torch.empty(width, d) for d in projected])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw tables and projections again."""
        for table in self.tables:
            started(table, std=self.std, init=self.init)
        for projection in self.projections:
            nn.init.normal_(projection, std=self.projection_std)

    def forward(self, tokens: Int[Tensor, "B T"], part: BatchSlice | None = None) -> Float[Tensor, "B T D"]:
        """E_i[tokens] P_iᵀ·√D ⊙ masks."""
        flat = tokens.flatten()
        if len(self.tables) == 1:
            rows = self._rows(0, flat)
        else:
            pieces = self.clusters.pieces(flat)
            rows = torch.cat([self._rows(cluster, piece.words) for cluster, piece in enumerate(pieces)])
            positions = torch.cat([piece.positions for piece in pieces])
            rows = torch.zeros_like(rows).index_copy(0, positions, rows)
        choices = {"rate": self.word_dropout, "training": self.training, "vocabulary_size": self.vocabulary_size}
        rows = words_dropped(rows.unflatten(0, tokens.shape) * self.scale, tokens, **choices)
        return dropped(rows, rate=self.dropout, training=self.training, part=part)

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.clusters.vocabulary_size

    def weights(self) -> list[Float[Tensor, "C d"]]:
        """The table of each cluster, for a tied head; a single table is split into its clusters."""
        tables = list(self.tables)
        # One split instead of one slice per cluster: the gradient of each slice would be a whole table.
        return tables if len(tables) > 1 else list(tables[0].split(self.clusters.sizes))

    def projection(self, cluster: int) -> Float[Tensor, "D d"] | None:
        """P_i; with one table ``projections[0]`` for every cluster; None if there are no projections."""
        return self.projections[min(cluster, len(self.projections) - 1)] if len(self.projections) else None

    def _rows(self, cluster: int, words: Tensor) -> Tensor:
        """The vectors [n D] of some words of one cluster, before scaling."""
        rows, projection = functional.embedding(words, self.tables[cluster]), self.projection(cluster)
        return rows if projection is None else linear(rows, projection)

    def extra_repr(self) -> str:
        """Sizes and dropout rates."""
        sizes = f"vocabulary_size={self.vocabulary_size}, cutoffs={self.clusters.cutoffs}"
        return f"{sizes}, dropout={self.dropout}, word_dropout={self.word_dropout}"
