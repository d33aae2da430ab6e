"""Rotary positions: queries and keys are turned by their positions, and the scores are their products alone.

Letters: B batch, T time (queries), M memory, K = M + T keys, L positions, H heads, C width of a head, N = H·B, heads
first.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equilibria.cells.transformer.positions import Positions, Rotation, by_distance, hide_padding
from equilibria.cells.transformer.separated import Separated
from equilibria.layers.cell import Prepared


class RotaryPositions(Positions):
    """The rotary embedding of queries and keys (Su et al. 2021), without parameters; see ``Rotation``."""

    def __init__(self, *, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window, self.width, self.heads = window, width, heads
        self.channels = 0

    def rotation(self, *, first: int, count: int, like: Tensor) -> Rotation:
        """The turns at ``count`` positions from ``first`` on."""
        return Rotation.of(first=first, count=count, width=self.width // self.heads, like=like)

    def table(self, *, queries: int, memory: int, like: Tensor) -> None:
        """None: turned queries and keys hold all of it."""
        del queries, memory, like

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
        """The mask, 0 or −∞. Shared: that of all samples [1 T K], or None where every query sees every key.

        Rows: with padding the mask [B H T K] of each sample instead, heads first in memory.
        """
        keys = memory + queries
        if queries == 1 and keys <= self.window and key_padding_mask is None:
            return Prepared(shared=None)
        mask = by_distance(like.new_zeros(1, keys), queries=queries, window=self.window)
        if key_padding_mask is None:
            return Prepared(shared=mask)
        rows = hide_padding(mask.expand(self.heads, batch, -1, -1), key_padding_mask)
        return Prepared(rows=rows.contiguous().transpose(0, 1))

    def forward(
        self, q: Float[Tensor, "N T C"], k: Float[Tensor, "N K C"], prepared: Prepared
    ) -> Float[Tensor, "N T K"]:
        """A_ij = q_i·k_j."""
        rows = prepared.rows
        mask = prepared.shared if rows is None else rows.transpose(0, 1).flatten(0, 1)
        keys = k.transpose(1, 2)
        return torch.bmm(q, keys) if mask is None else torch.baddbmm(mask, q, keys)

    @property
    def separable(self) -> bool:
        """Always."""
        return True

    def separated(self, u: Float[Tensor, "H C"], *, queries: int, memory: int, like: Tensor) -> Separated:
        """Nothing besides the products."""
        return Separated()
