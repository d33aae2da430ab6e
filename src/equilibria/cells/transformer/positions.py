"""Positions in attention: the interface of their kinds, with the causal window built in, and the simplest kind.

Each kind is a module with its parameters: ``DecayPositions`` here, and those of ``relative`` and ``rotary``. Its
``prepare`` computes the values for one solve, and its ``forward`` turns queries and keys into the scores A + mask with
as few passes over the (H, B, T, K) scores as possible.

Letters: B batch, T time (queries), M memory, K = M + T keys, L positions, H heads, C width of a head, F = C/2
frequencies, N = H·B, heads first; G is H, or 1 for a bias that all heads share. Query i sees key j iff
0 ≤ M + i − j < window.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from equilibria.cells.transformer.separated import Separated, angles
from equilibria.layers.cell import Prepared


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """The rotary embedding R of L consecutive positions (Su et al. 2021, §3.2.2), which turns queries and keys.

    Channel f of a head and channel F + f are one pair, as in GPT-NeoX and Llama (the paper pairs neighbours, which is
    the same up to the order of the channels). At position p the pair is turned by the angle pω_f, where
    ω_f = 10000^(−2f/C). Turns are orthogonal: (R_p q)·(R_s k) depends on p − s alone.
    """

    cosines: Float[Tensor, "L C"]
    """cos pω_f, twice."""
    sines: Float[Tensor, "L C"]
    """−sin pω_f, then sin pω_f."""

    @classmethod
    def of(cls, *, first: int, count: int, width: int, like: Tensor) -> Rotation:
        """R at the positions ``first``, ``first`` + 1, …, for heads of ``width`` channels.

        The angles are computed in float64, and their sines in float32 or wider.
        """
        angle = angles(torch.arange(first, first + count, dtype=torch.float64, device=like.device), width)
        wide = torch.promote_types(like.dtype, torch.float32)
        cosines, sines = angle.cos().to(wide), angle.sin().to(wide)
        return cls(cosines=torch.cat([cosines, cosines], dim=1), sines=torch.cat([-sines, sines], dim=1))

    def __call__(self, x: Float[Tensor, "*heads L C"]) -> Float[Tensor, "*heads L C"]:
        """R x, position by position, contiguous, with the dtype of x."""
        left, right = x.chunk(2, dim=-1)
        turned = torch.addcmul(torch.cat([right, left], dim=-1) * self.sines, x, self.cosines)
        return turned.to(x.dtype)


class Positions(nn.Module, ABC):
    """One kind of positions: a table that depends on parameters and distances alone, and the scores computed with it.

    Rotary positions turn queries and keys before the scores; all others leave them as they are.
    """

    window: int
    """Number of keys that a query sees, itself included."""
    channels: int
    """Number of channels that ``separated`` adds to those of a head."""

    @property
    @abstractmethod
    def separable(self) -> bool:
        """True where ``separated`` gives the same scores."""

    @abstractmethod
    def separated(self, u: Float[Tensor, "H C"], *, queries: int, memory: int, like: Tensor) -> Separated:
        """The term without its mask, for fused attention; it draws the same random numbers as ``table``."""

    def rotation(self, *, first: int, count: int, like: Tensor) -> Rotation | None:
        """The turns of queries and keys at ``count`` positions from ``first`` on; None if they are not turned.

        Only differences of positions matter, so that queries and all their keys may be counted from anywhere.
        """
        del first, count, like
        return None

    @abstractmethod
    def table(self, *, queries: int, memory: int, like: Tensor) -> Tensor | None:
        """The term by distance, with graph; a table for more keys can be used for fewer. None if there is none."""

    @abstractmethod
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
        """The position term for ``queries`` after ``memory`` keys, with graph.

        Args:
            u: the bias that is already added to the queries.
            batch: number of samples.
            queries: T.
            memory: M.
            like: gives dtype and device.
            table: the result of ``table`` for these keys or more; computed if None.
            key_padding_mask: True for padding keys. A query sees such a key only if it is at the same position.
        """

    @abstractmethod
    def forward(
        self, q: Float[Tensor, "N T C"], k: Float[Tensor, "N K C"], prepared: Prepared
    ) -> Float[Tensor, "N T K"]:
        """The masked scores; q already contains u and 1/√C, and q and k are turned."""


def by_distance(row: Float[Tensor, "G K"], *, queries: int, window: int) -> Float[Tensor, "G T K"]:
    """The entry of distance M + i − j at (i, j), and −∞ where query i does not see key j.

    ``row`` holds the distances K−1, …, 0. Query i reads K consecutive entries of it and of T−1 future places.
    """
    keys = row.shape[1]
    if queries > 1:
        row = functional.pad(row, (0, queries - 1), value=-math.inf)
    if keys > window:
        far = torch.arange(row.shape[1], device=row.device) < keys - window
        row = row.masked_fill(far, -math.inf)
    return row.unfold(1, keys, 1).flip(1) if queries > 1 else row.unsqueeze(1)


def hide_padding(
    bias: Float[Tensor, "*shape T K"], key_padding_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, "*shape T K"]:
    """The bias with −∞ at the keys that are padding. A query sees such a key only if it is at the same position.

    The result has an axis for the samples before its last two axes.
    """
    queries, keys = bias.shape[-2:]
    key = torch.arange(keys, device=bias.device)
    itself = key[keys - queries :, None] == key
    return bias.masked_fill(key_padding_mask[:, None] & ~itself, -math.inf)


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
        return functional.pad(row, (keys - row.shape[1], 0))  # no query sees keys outside the window

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
