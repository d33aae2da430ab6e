"""Attention by one fused call, which writes no scores to memory: the same function as the exact form, up to rounding.

Letters: B batch, T time (queries), M memory, K = M + T keys, D width, H heads, C width of a head; G is H, or 1 for a
bias that all heads share.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from equilibria.cells.transformer.kernel import Bias, attention
from equilibria.cells.transformer.positions import Positions, by_distance, hide_padding
from equilibria.cells.transformer.separated import Channels
from equilibria.layers.cell import Prepared
from equilibria.torch_private import is_traced

WIDEST_ON_GPU = 256
"""The widest head that the fused kernels of a GPU compute."""
LEAST_SCORES = 100_000
"""Number of scores of a batch, for each channel of a head in the fused call, from which on "auto" is fused. With fewer
of them the exact form is the quicker one on a CPU: its scores fit into the caches, or the fused call has too many
further channels (benchmarks/attention.py; it was not measured on a GPU)."""
NUMBERS = 1 << 18
"""Largest size of the keys of one fused call on a CPU, in numbers per thread; one sample may exceed it. The further
channels make queries, keys, values and their gradients several times as wide as a head. So a large batch is divided,
and they are in memory for a few samples at a time."""
Form = Literal["exact", "fused", "auto"]
"""The values of ``TransformerConfig.attention``."""


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
    if_quicker: bool,
    batch: int,
    queries: int,
    memory: int,
    like: Tensor,
    key_padding_mask: Bool[Tensor, "B K"] | None = None,
) -> Prepared | None:
    """Shared: a ``FusedTerm``. Rows: the bias [B G T K] of each sample, or None.

    None comes back where the exact form is to be taken: where no other is right, for one new position, and with
    ``if_quicker`` where it is the quicker one.

    Args:
        positions: the position term.
        u: the bias that is already added to the queries.
        if_quicker: what the configuration asks for: "auto" if True, "fused" if False.
        batch: B.
        queries: T.
        memory: M.
        like: gives dtype and device.
        key_padding_mask: True for padding keys. A query sees such a key only if it is at the same position.
    """
    heads, channels = len(u), u.shape[1] + positions.channels
    small = heads * batch * queries * (memory + queries) < LEAST_SCORES * channels
    too_wide = like.is_cuda and channels > WIDEST_ON_GPU
    if (if_quicker and small) or queries == 1 or too_wide or not positions.separable:
        return None
    term = positions.separated(u, queries=queries, memory=memory, like=like)
    keys, padding = memory + queries, key_padding_mask
    if term.bias is None and memory == 0 and keys <= positions.window and padding is None:
        return Prepared(shared=FusedTerm(channels=term.channels, bias=None))
    row = like.new_zeros(1, keys) if term.bias is None else term.bias
    bias = by_distance(row, queries=queries, window=positions.window).unsqueeze(0)
    if padding is None:
        return Prepared(shared=FusedTerm(channels=term.channels, bias=bias))
    rows = hide_padding(bias.transpose(0, 1).expand(-1, len(padding), -1, -1), padding).transpose(0, 1)
    return Prepared(shared=FusedTerm(channels=term.channels, bias=None), rows=rows.contiguous())


def attend(
    q: Float[Tensor, "H B T C"], k: Float[Tensor, "H B K C"], v: Float[Tensor, "H B K C"], prepared: Prepared
) -> Float[Tensor, "B T H C"]:
    """The values, weighted by the softmax of the scores; q already contains u and 1/√C."""
    term: FusedTerm = prepared.shared
    bias = term.bias if prepared.rows is None else prepared.rows
    bias = None if bias is None else bias.to(q.dtype)
    if term.channels is None:
        return _attended(q, k, v, bias)
    channels = q.shape[3] + term.channels.keys.shape[1]
    together = max(1, NUMBERS * torch.get_num_threads() // (len(q) * k.shape[2] * channels))
    if q.device.type != "cpu" or is_traced() or together >= q.shape[1]:
        return _with_channels(q, k, v, bias, term.channels)
    queries, keys, values = (x.split(together, dim=1) for x in (q, k, v))
    biases = [bias] * len(queries) if bias is None or len(bias) == 1 else bias.split(together)
    groups = zip(queries, keys, values, biases, strict=True)
    return torch.cat([_with_channels(*group, term.channels) for group in groups])


def _with_channels(
    q: Float[Tensor, "H B T C"],
    k: Float[Tensor, "H B K C"],
    v: Float[Tensor, "H B K C"],
    bias: Bias,
    channels: Channels,
) -> Float[Tensor, "B T H C"]:
    further, width = channels.keys.to(q.dtype), v.shape[3]
    q = torch.cat([q, *(half.to(q.dtype) for half in channels.of_queries(q))], dim=3)
    k = torch.cat([k, further.expand(*k.shape[:2], -1, -1)], dim=3)
    v = functional.pad(v, (0, further.shape[1]))  # the kernel of a CPU is for values as wide as the keys
    return _attended(q, k, v, bias)[..., :width]


def _attended(
    q: Float[Tensor, "H B T C"], k: Float[Tensor, "H B K C"], v: Float[Tensor, "H B K C"], bias: Bias
) -> Float[Tensor, "B T H C"]:
    return attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), bias).transpose(1, 2)
