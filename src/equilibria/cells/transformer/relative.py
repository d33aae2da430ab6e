"""Positions as a term of attention that depends on content and distance, as in Transformer-XL.

Letters: B batch, T time (queries), M memory, K = M + T keys, K1 = K + 1, D width, H heads, C = D/H width of a head,
N = H·B, heads first. Query i sees key j iff 0 ≤ M + i − j < window.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from equilibria.cells.transformer.positions import Positions
from equilibria.cells.transformer.separated import Channels, Separated, angles
from equilibria.layers.cell import Prepared
from equilibria.layers.dropout import dropout_mask, masked
from equilibria.layers.linear import Init, NormedLinear
from equilibria.layers.matrices import weights_of


def sinusoids(count: int, width: int, like: Tensor) -> Float[Tensor, "count width"]:
    """Rows [sin δω, cos δω] for the distances δ = count−1, …, 0; ω_i = 10000^(−2i/width) (Vaswani et al. 2017)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    distance = torch.arange(count - 1, -1, -1, dtype=wide, device=like.device)
    angle = angles(distance, width)
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)


def relative_shift(raw: Float[Tensor, "N T K1"]) -> Float[Tensor, "N T K"]:
    """The entries raw[n, i, 1 + j + (T−1−i)] at (n, i, j): scores by distance become scores by key (Dai et al. 2019).

    ``raw`` holds a column of padding before the distances K−1, …, 0, so K1 = K + 1. Read as one long row without its
    first T numbers and cut into rows of K, it is shifted as wanted for j ≤ M + i; entries at later j are meaningless.
    The result is a view.
    """
    _, queries, columns = raw.shape
    return raw.flatten(1)[:, queries:].unflatten(1, (queries, columns - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class RelativeTerm:
    """The part of ``RelativePositions``' term that all samples share."""

    table: Float[Tensor, "H C K1"]
    """P by distance, K−1 … 0, after a column of zeros, the padding that ``relative_shift`` needs."""
    shift: Float[Tensor, "H 1 C"]
    """(v − u)/√C."""
    visible: Float[Tensor, "1 1"]
    """0, the mask where every query sees every key."""


class RelativePositions(Positions):
    """The content-dependent position term of Transformer-XL (Dai et al. 2019, §3.3): P = R W_r and the bias v.

    Args:
        width: D.
        heads: H.
        window: number of keys that a query sees, itself included.
        dropout: the share of the channels of R to drop.
        variational: drop the same channels at all distances; otherwise each distance has its own.
        weight_norm: normalise the weights W_r.
        init: how W_r starts.
        std: the standard deviation of v, and of W_r with init "normal".
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        window: int,
        dropout: float,
        variational: bool,
        weight_norm: bool,
        init: Init,
        std: float,
    ) -> None:
        super().__init__()
        self.window, self.dropout, self.variational = window, dropout, variational
        self.std = std
        self.channels = width
        self.v = nn.Parameter(torch.empty(heads, width // heads))
        self.reset_parameters()
        self.project = NormedLinear(inputs=width, outputs=width, bias=False, normed=weight_norm, init=init, std=std)

    def reset_parameters(self) -> None:
        """Draw v again; W_r draws its own parameters."""
        nn.init.normal_(self.v, std=self.std)

    def table(self, *, queries: int, memory: int, like: Tensor) -> Float[Tensor, "H C K1"]:
        """P for the distances K−1, …, 0 after a column of zeros, with graph; one for more keys also serves fewer."""
        keys, (heads, width) = memory + queries, self.v.shape
        rows = sinusoids(keys, heads * width, like)
        shape = (1 if self.variational else keys, heads * width)
        rows = masked(rows, dropout_mask(shape, rate=self.dropout, training=self.training, like=rows, rows=None))
        weight, _ = weights_of(self.project, inputs=heads * width, like=self.v, bias=False)
        rows = (rows @ weight.t()).view(keys, heads, width).permute(1, 2, 0)
        return nn.functional.pad(rows, (1, 0))

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
        """Shared: a ``RelativeTerm``. Rows: the mask [B T K1], 0 or −∞, or None where every query sees every key.

        The mask is −∞ at the entries that ``relative_shift`` moves to keys which a query must not see, so that masking
        takes no extra pass over the scores.
        """
        keys = memory + queries
        table = self.table(queries=queries, memory=memory, like=like) if table is None else table
        term = RelativeTerm(
            # The values in the first column do not matter: the shift drops them, or the mask is −∞ there.
            table=table[:, :, -keys - 1 :],
            shift=((self.v - u) / math.sqrt(u.shape[1])).unsqueeze(1),
            visible=like.new_zeros(1, 1),
        )
        return Prepared(
            shared=term,
            rows=self._mask(batch=batch, queries=queries, keys=keys, key_padding_mask=key_padding_mask, like=like),
        )

    def forward(
        self, q: Float[Tensor, "N T C"], k: Float[Tensor, "N K C"], prepared: Prepared
    ) -> Float[Tensor, "N T K"]:
        """A_ij = q_i·k_j + (q_i + v − u)·P_(M+i−j)."""
        term, mask = prepared.shared, prepared.rows
        rows, queries, width = q.shape
        heads = len(term.table)
        mask = term.visible if mask is None else mask.flatten(0, 1)
        # One product per head over all samples, since P is the same for each of them.
        by_distance = torch.baddbmm(mask.expand(heads, -1, -1), q.view(heads, -1, width) + term.shift, term.table).view(
            rows, queries, -1
        )
        return torch.baddbmm(relative_shift(by_distance), q, k.transpose(1, 2))

    @property
    def separable(self) -> bool:
        """False where each distance has its own dropout mask."""
        return self.variational or not self.training or self.dropout == 0

    def separated(self, u: Float[Tensor, "H C"], *, queries: int, memory: int, like: Tensor) -> Separated:
        """P as D further channels of queries and keys."""
        drop = dropout_mask((1, self.channels), rate=self.dropout, training=self.training, like=like, rows=None)
        weight, _ = weights_of(self.project, inputs=self.channels, like=self.v, bias=False)
        projection = masked(weight, drop).unflatten(0, self.v.shape)
        shift = ((self.v - u) / math.sqrt(u.shape[1])).unsqueeze(1)
        return Separated(channels=Channels.of(projection, shift, queries=queries, memory=memory))

    def _mask(
        self, *, batch: int, queries: int, keys: int, key_padding_mask: Bool[Tensor, "B K"] | None, like: Tensor
    ) -> Float[Tensor, "B T K1"] | None:
        if queries == 1 and keys <= self.window and key_padding_mask is None:
            return None
        query = torch.arange(queries, device=like.device)[:, None]
        column = torch.arange(-1, keys, device=like.device)  # −1 is the padding
        # Row i of the shifted scores begins at column T−1−i; earlier columns belong to no pair (i, j ≤ M+i).
        visible = (column >= queries - 1 - query) & (keys - 1 - column < self.window) & (column >= 0)
        key = column - (queries - 1 - query)
        visible = visible.expand(batch, -1, -1)
        if key_padding_mask is not None:
            unseen = key_padding_mask[:, key.clamp(0, keys - 1)] & (key != keys - queries + query)
            visible = visible & ~unseen
        zeros = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
        return zeros.masked_fill_(~visible, -math.inf)
