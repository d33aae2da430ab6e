"""Attention by one fused call, which writes no scores to memory: the same function as the exact form, up to rounding.

Letters: B batch, T time (queries), M memory, K = M + T keys, D width, H heads, C width of a head; G is H, or 1 for a
bias that all heads share.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from equilibria.cells.transformer.kernel import attention
from equilibria.cells.transformer.positions import Positions
from equilibria.cells.transformer.separated import Channels
from equilibria.layers.cell import Prepared

WIDEST_ON_GPU = 256
"""The widest head that the fused kernels of a GPU compute."""


@dataclasses.dataclass(frozen=True, eq=False)
class FusedTerm:
    """The position term and the mask, as far as all samples share them."""

    channels: Channels | None
    """Further channels of queries and keys."""
    bias: Float[Tensor, "1 G T K"] | None
    """Added to the scores, −∞ where query i does not see key j. None where each sample has its own, or where there is
    no memory and every query sees all keys before it."""


def prepare_fused(
    positions: Positions,
    u: Float[Tensor, "H C"],
    *,
    queries: int,
    memory: int,
    like: Tensor,
    key_padding_mask: Bool[Tensor, "B K"] | None = None,
) -> Prepared | None:
    """Shared: a ``FusedTerm``. Rows: the bias [B G T K] of each sample, or None.

    None comes back where only the exact form is right, or where it is the quicker one: for one new position.

    Args:
        positions: the position term.
        u: the bias that is already added to the queries.
        queries: T.
        memory: M.
        like: gives dtype and device.
        key_padding_mask: True for padding keys, which a query of their stream sees only at its own position.
    """
    too_wide = like.is_cuda and u.shape[1] + positions.channels > WIDEST_ON_GPU
    if queries == 1 or too_wide or not positions.separable:
        return None
    term = positions.separated(u, queries=queries, memory=memory, like=like)
    keys, padding = memory + queries, key_padding_mask
    if term.bias is None and memory == 0 and keys <= positions.window and padding is None:
        return Prepared(shared=FusedTerm(channels=term.channels, bias=None))
    row = like.new_zeros(1, keys) if term.bias is None else term.bias
    bias = by_distance(row, queries=queries, window=positions.window).unsqueeze(0)
    if padding is None:
        return Prepared(shared=FusedTerm(channels=term.channels, bias=bias))
    itself = torch.arange(memory, keys, device=like.device)[:, None] == torch.arange(keys, device=like.device)
    rows = bias.masked_fill(padding[:, None, None] & ~itself, -math.inf)
    return Prepared(shared=FusedTerm(channels=term.channels, bias=None), rows=rows)


def by_distance(row: Float[Tensor, "G K"], *, queries: int, window: int) -> Float[Tensor, "G T K"]:
    """The entry of distance M + i − j at (i, j), and −∞ where query i does not see key j.

    ``row`` holds the distances K−1, …, 0. Query i reads K consecutive entries of it and of T−1 future places.
    """
    keys = row.shape[1]
    row = functional.pad(row, (0, queries - 1), value=-math.inf)
    if keys > window:
        far = torch.arange(row.shape[1], device=row.device) < keys - window
        row = row.masked_fill(far, -math.inf)
    return row.unfold(1, keys, 1).flip(1)


def attend(
    q: Float[Tensor, "H B T C"], k: Float[Tensor, "H B K C"], v: Float[Tensor, "H B K C"], prepared: Prepared
) -> Float[Tensor, "B T H C"]:
    """The values, weighted by the softmax of the scores; q already contains u and 1/√C."""
    term: FusedTerm = prepared.shared
    bias = term.bias if prepared.rows is None else prepared.rows
    width, dtype = v.shape[3], q.dtype
    if term.channels is not None:
        q = torch.cat([q, term.channels.of_queries(q).to(dtype)], dim=3)
        further = term.channels.keys.to(dtype)
        k = torch.cat([k, further.expand(*k.shape[:2], -1, -1)], dim=3)
        v = functional.pad(v, (0, further.shape[1]))  # the kernel of a CPU is for values as wide as the keys
    heads = attention(*(x.transpose(0, 1) for x in (q, k, v)), None if bias is None else bias.to(dtype))
    return heads[..., :width].transpose(1, 2)
