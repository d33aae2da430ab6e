"""Positions as a learned bias of attention per head and distance.

Letters: B batch, T time (queries), M memory, K = M + T keys, H heads, C width of a head, N = H·B, heads first.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from equilibria.cells.transformer.positions import Positions
from equilibria.cells.transformer.separated import Separated, by_distance, hide_padding
from equilibria.layers.cell import Prepared


class DecayPositions(Positions):
    """A learned bias b per head and distance, started at −slope·distance (the start is ALiBi, Press et al. 2022)."""

    def __init__(self, *, heads: int, window: int, longest: int) -> None:
        super().__init__()
        self.window, self.longest = window, longest
        self.channels = 0
        self.bias = nn.Parameter(torch.empty(heads, longest))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set b to −slope·distance."""
        heads, longest = self.bias.shape
        self.bias.copy_(-slopes(heads)[:, None] * torch.arange(longest))

    def table(self, *, queries: int, memory: int, like: Tensor) -> Float[Tensor, "H K"]:
        """b for the distances K−1, …, 0, with graph; one for more keys also serves fewer."""
        keys = memory + queries
        if keys > self.longest and self.window > self.longest:
            raise ValueError(
                f"memory and segment are {memory} + {queries} = {keys} positions long, but the decay has biases for "
                f"{self.longest}; use shorter segments or a shorter memory, build the cell with longest={keys} or "
                f"more, or with window={self.longest} or less."
            )
        row = self.bias[:, :keys].flip(1).to(like.dtype)
        return nn.functional.pad(row, (keys - row.shape[1], 0))  # no query sees keys outside the window

    def prepare(
        self,
        u: Float[Tensor, "H C"],
        *,
        batch: int,
        queries: int,
        memory: int,
        like: Tensor,
        table: Tensor | None = None,
        key_padding_mask: Bool[Tensor, "B K"] | None = None,
    ) -> Prepared:
        """Rows: the bias b [B H T K], heads first in memory, and −∞ where query i does not see key j."""
        keys = memory + queries
        row = self.table(queries=queries, memory=memory, like=like) if table is None else table[:, -keys:]
        bias = by_distance(row, queries=queries, window=self.window).unsqueeze(1).expand(-1, batch, -1, -1)
        if key_padding_mask is not None:
            bias = hide_padding(bias, key_padding_mask)
        return Prepared(rows=bias.contiguous().transpose(0, 1))

    def forward(
        self, q: Float[Tensor, "N T C"], k: Float[Tensor, "N K C"], prepared: Prepared
    ) -> Float[Tensor, "N T K"]:
        """A_ij = q_i·k_j + b_(M+i−j)."""
        return torch.baddbmm(prepared.rows.transpose(0, 1).flatten(0, 1), q, k.transpose(1, 2))

    @property
    def separable(self) -> bool:
        """Always."""
        return True

    def separated(self, u: Float[Tensor, "H C"], *, queries: int, memory: int, like: Tensor) -> Separated:
        """b by distance."""
        return Separated(bias=self.table(queries=queries, memory=memory, like=like))


def slopes(heads: int) -> Float[Tensor, " heads"]:
    """Initial decay rate of each head: 2, 0.7, 0.2, 0.05 for four heads, else geometric from 2 to 0.05."""
    if heads == 4:
        return torch.tensor([2, 0.7, 0.2, 0.05])
    return torch.logspace(math.log10(2), math.log10(0.05), heads) if heads > 1 else torch.tensor([math.sqrt(0.1)])
