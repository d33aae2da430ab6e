"""How attention knows where things are: two kinds of position term, each with the causal window built in.

Each kind is a module with the parameters, whose ``prepare`` gives a value for one solve; the value turns queries and
keys into the scores A + mask with as few passes over the (H, B, T, K) scores as possible.

Letters: B batch, T time (queries), M memory, K = M + T keys, D width, H heads, C = D/H width of a head, N = H·B.
Query i sees key j iff 0 ≤ M + i − j < window.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equilibria.cells.masks import dropout_mask, masked
from equilibria.cells.weight_norm import Init, NormedLinear


def sinusoids(count: int, width: int, like: Tensor) -> Float[Tensor, "count width"]:
    """Rows [sin δω, cos δω] for the distances δ = count−1, …, 0; ω_i = 10000^(−2i/width) (Vaswani et al. 2017)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    distance = torch.arange(count - 1, -1, -1, dtype=wide, device=like.device)
    omega = 10000 ** (-torch.arange(0, width, 2, dtype=wide, device=like.device) / width)
    angle = distance[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)


def relative_shift(raw: Float[Tensor, "N T K1"]) -> Float[Tensor, "N T K"]:
    """The entries raw[n, i, 1 + j + (T−1−i)] at (n, i, j): scores by distance become scores by key (Dai et al. 2019).

    ``raw`` holds a column of padding before the distances K−1, …, 0, so K1 = K + 1. Read as one long row without its
    first T numbers and cut into rows of K, it is shifted as wanted for j ≤ M + i; what lands at later j is meaningless.
    No number is moved.
    """
    _, queries, columns = raw.shape
    return raw.flatten(1)[:, queries:].unflatten(1, (queries, columns - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class RelativeScores:
    """A_ij = q_i·k_j + (q_i + v − u)·P_(M+i−j), where q already has u and 1/√C inside."""

    table: Float[Tensor, "H C K1"]
    """P by distance, K−1 … 0, after a column of zeros: the padding that ``relative_shift`` needs, for nothing."""
    shift: Float[Tensor, "H 1 C"]
    """(v − u)/√C."""
    mask: Float[Tensor, "BT K1"]
    """0, or −∞ wherever ``relative_shift`` brings what query i must not see: no pass over the scores is spent on it."""

    def __call__(self, q: Float[Tensor, "N T C"], k: Float[Tensor, "N K C"]) -> Float[Tensor, "N T K"]:
        """The scores, masked."""
        rows, queries, width = q.shape
        heads = len(self.table)
        # One product per head over all samples, since P is the same for each of them.
        by_distance = torch.baddbmm(
            self.mask.expand(heads, -1, -1), q.view(heads, -1, width) + self.shift, self.table
        ).view(rows, queries, -1)
        return torch.baddbmm(relative_shift(by_distance), q, k.transpose(1, 2))


class RelativePositions(nn.Module):
    """The content-dependent position term of Transformer-XL (Dai et al. 2019, §3.3): P = R W_r and the bias v."""

    def __init__(self, *, width: int, heads: int, window: int, dropout: float, weight_norm: bool, init: Init) -> None:
        super().__init__()
        self.window, self.dropout = window, dropout
        self.v = nn.Parameter(torch.empty(heads, width // heads).normal_(std=0.01))
        self.project = NormedLinear(inputs=width, outputs=width, bias=False, normed=weight_norm, init=init)

    def prepare(
        self, u: Float[Tensor, "H C"], *, batch: int, queries: int, memory: int, like: Tensor
    ) -> RelativeScores:
        """The position term for ``queries`` after ``memory`` keys, with graph."""
        heads, width = u.shape
        keys = memory + queries
        table = sinusoids(keys, heads * width, like)
        rate, training = self.dropout, self.training
        table = masked(table, dropout_mask((1, heads * width), rate=rate, training=training, like=table))
        table = (table @ self.project.effective().t()).view(keys, heads, width).permute(1, 2, 0)
        return RelativeScores(
            table=nn.functional.pad(table, (1, 0)),
            shift=((self.v - u) / math.sqrt(width)).unsqueeze(1),
            mask=self._mask(queries=queries, keys=keys, like=like).repeat(batch, 1),
        )

    def _mask(self, *, queries: int, keys: int, like: Tensor) -> Float[Tensor, "T K1"]:
        query = torch.arange(queries, device=like.device)[:, None]
        column = torch.arange(-1, keys, device=like.device)  # −1 is the padding
        # Row i of the shifted scores begins at column T−1−i; what lies before it belongs to no pair (i, j ≤ M+i).
        visible = (column >= queries - 1 - query) & (keys - 1 - column < self.window) & (column >= 0)
        return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, -math.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class DecayScores:
    """A_ij = q_i·k_j + b_(M+i−j), where q already has u and 1/√C inside."""

    bias: Float[Tensor, "N T K"]
    """b, and −∞ where query i does not see key j."""

    def __call__(self, q: Float[Tensor, "N T C"], k: Float[Tensor, "N K C"]) -> Float[Tensor, "N T K"]:
        """The scores, masked."""
        return torch.baddbmm(self.bias, q, k.transpose(1, 2))


class DecayPositions(nn.Module):
    """A learned bias b per head and distance, started at −slope·distance (the start is ALiBi, Press et al. 2022)."""

    def __init__(self, *, heads: int, window: int, longest: int) -> None:
        super().__init__()
        self.window, self.longest = window, longest
        self.bias = nn.Parameter(-slopes(heads)[:, None] * torch.arange(longest))

    def prepare(self, u: Float[Tensor, "H C"], *, batch: int, queries: int, memory: int, like: Tensor) -> DecayScores:
        """The bias for ``queries`` after ``memory`` keys, with graph."""
        heads, keys = len(u), memory + queries
        if keys > self.longest:
            raise ValueError(
                f"memory and segment are {memory} + {queries} = {keys} positions long, but the decay has biases for "
                f"{self.longest}; use shorter segments, or build the cell with longest={keys} or more."
            )
        # One row a head, distances K−1 … 0, then T−1 places that lie in the future: query i reads K of them.
        row = self.bias[:, :keys].flip(1).to(like.dtype)
        row = nn.functional.pad(row, (0, queries - 1), value=-math.inf)
        if keys > self.window:
            far = torch.arange(row.shape[1], device=like.device) < keys - self.window
            row = row.masked_fill(far, -math.inf)
        bias = row.unfold(1, keys, 1).flip(1)
        return DecayScores(bias=bias.unsqueeze(1).expand(-1, batch, -1, -1).reshape(heads * batch, queries, keys))


def slopes(heads: int) -> Float[Tensor, " heads"]:
    """How fast each head forgets at first: 2, 0.7, 0.2, 0.05 for four heads, else a geometric row from 2 to 0.05."""
    if heads == 4:
        return torch.tensor([2, 0.7, 0.2, 0.05])
    return torch.logspace(math.log10(2), math.log10(0.05), heads) if heads > 1 else torch.tensor([math.sqrt(0.1)])
