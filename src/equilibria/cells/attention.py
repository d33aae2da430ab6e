"""Multi-head attention with memory and input injection, prepared for a solve and then iterated.

Letters: B batch, T time, M memory, K = M + T keys, D width, H heads, C = D/H width of a head, N = H·B.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from equilibria.cells.masks import dropout_mask, masked
from equilibria.cells.positions import DecayPositions, DecayScores, RelativePositions, RelativeScores
from equilibria.cells.weight_norm import Init, NormedLinear


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionContext:
    """What is constant during a solve, with graph where it depends on parameters or input."""

    qkv: Float[Tensor, "D 3*D"]
    """Effective weight of queries, keys and values, transposed, with 1/√C inside the queries' part."""
    injection: Float[Tensor, "BT 3*D"]
    """U = x W_in + b_in, with the bias u of the queries and their 1/√C inside."""
    past: Float[Tensor, "2 H B M C"] | None
    """Keys and values of the memory."""
    scores: RelativeScores | DecayScores
    """Queries and keys to scores, position term and mask included."""
    out: Float[Tensor, "D D"]
    """Effective weight of the output."""
    drop: Float[Tensor, "N T K"] | None
    """Dropout mask of the attention weights, which are not summed to one again."""
    u: Float[Tensor, "B T 3*D"]
    """U as it is remembered: detached, nothing folded in."""


class Attention(nn.Module):
    """o = softmax(A) V W_o + b_o with A_ij = (q_i + u)·k_j/√C + position term, and [q|k|v] = c W_qkv + [U0; U].

    Args:
        width: D, channels of states and inputs.
        heads: H, which share the width.
        positions: gives the position term and the mask.
        dropout: share of the attention weights that is dropped.
        weight_norm: whether W_qkv and W_o are weight-normed.
        init: how they start.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        positions: RelativePositions | DecayPositions,
        dropout: float,
        weight_norm: bool,
        init: Init,
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.positions = heads, dropout, positions
        self.inject = NormedLinear(inputs=width, outputs=3 * width, normed=False, init="normal")
        self.qkv = NormedLinear(inputs=width, outputs=3 * width, bias=False, normed=weight_norm, init=init)
        self.out = NormedLinear(inputs=width, outputs=width, normed=weight_norm, init=init)
        self.u = nn.Parameter(torch.empty(heads, width // heads).normal_(std=0.01))

    def prepare(
        self, x: Float[Tensor, "B T D"], z0: Float[Tensor, "B M D"] | None, u0: Float[Tensor, "B M 3*D"] | None
    ) -> AttentionContext:
        """The constants under input x and the memory: states Z0 (normed where queries are) and injections U0."""
        batch, time, width = x.shape
        u, qkv = functional.linear(x, self.inject.effective(), self.inject.bias), self.qkv.effective()
        # u and 1/√C concern queries only: both go into what is added to and multiplied with them anyway.
        scale = torch.ones(3 * width, dtype=x.dtype, device=x.device)
        scale[:width] = 1 / math.sqrt(width // self.heads)
        bias = functional.pad(self.u.flatten(), (0, 2 * width))
        past = None if z0 is None or u0 is None else self._split(functional.linear(z0, qkv[width:]) + u0[..., width:])
        length = 0 if past is None else past.shape[3]
        mask_shape = (self.heads * batch, time, length + time)
        return AttentionContext(
            qkv=(qkv * scale.unsqueeze(1)).t(),
            injection=((u + bias) * scale).flatten(0, 1),
            past=past,
            scores=self.positions.prepare(self.u, batch=batch, queries=time, memory=length, like=x),
            out=self.out.effective().t(),
            drop=dropout_mask(mask_shape, rate=self.dropout, training=self.training, like=x),
            u=u.detach(),
        )

    def forward(self, x: Float[Tensor, "B T D"], context: AttentionContext) -> Float[Tensor, "B T D"]:
        """The attention output o of the current positions: five matrix products, or four with decay."""
        batch, time, _ = x.shape
        qkv = torch.addmm(context.injection, x.flatten(0, 1), context.qkv).view(batch, time, -1)
        q, k, v = self._split(qkv).unbind()
        if context.past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(context.past, (k, v), strict=True))
        scores = context.scores(q.flatten(0, 1), k.flatten(0, 1))
        weights = masked(torch.softmax(scores, dim=-1), context.drop)
        heads = torch.bmm(weights, v.flatten(0, 1)).view(self.heads, batch, time, -1)
        return functional.linear(heads.permute(1, 2, 0, 3).flatten(2), context.out.t(), self.out.bias)

    def _split(self, rows: Float[Tensor, "B L SD"]) -> Float[Tensor, "S H B L C"]:
        """Queries, keys or values side by side in one row, into heads."""
        batch, length, _ = rows.shape
        width = self.u.numel()
        parts = rows.view(batch, length, -1, self.heads, width // self.heads)
        return parts.permute(2, 3, 0, 1, 4)
