"""Multi-head attention with memory and input injection, prepared for a solve and then iterated.

Letters: B batch, T time, M memory, K = M + T keys, D width, H heads, C = D/H width of a head, N = H·B,
E = 3·D queries, keys and values.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from equilibria.cells.transformer.cache import KeyValueCache
from equilibria.cells.transformer.fused import Form, FusedTerm, attend, prepare_fused
from equilibria.cells.transformer.positions import Positions, Rotation
from equilibria.layers.cell import Prepared
from equilibria.layers.dropout import BatchSlice, dropout_mask, masked
from equilibria.layers.linear import Init, NormedLinear, linear, weights_of
from equilibria.layers.matrices import LinearWeights
from equilibria.torch_private import denormals_are_zero, is_forward_mode, is_traced, is_transformed, softmax_backward


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Values that depend on the parameters alone, with graph."""

    qkv: Float[Tensor, "E D"]
    """Effective weights of queries, keys and values, the queries' part multiplied by 1/√C."""
    scale: Float[Tensor, " 3*D"]
    """1/√C for the queries, 1 for keys and values."""
    bias: Float[Tensor, " 3*D"]
    """u/√C for the queries, 0 for keys and values."""
    out: LinearWeights
    """Effective weights [D D] and bias of the output."""


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionShared:
    """Values that all samples share during a solve, with graph."""

    weights: AttentionWeights
    """The effective weights."""
    rotation: Rotation | None
    """Turns the queries and the new keys; None if positions do not turn them."""
    positions: Any
    """The shared part of the position term."""
    fused: FusedTerm | None = None
    """The same for fused attention, instead of ``positions``; None for the exact form."""


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionRows:
    """Values that each sample has of its own during a solve, with graph where they depend on the input."""

    injection: Float[Tensor, "B T E"] | None
    """U plus the bias u of the queries, the queries' part multiplied by 1/√C; None without an injection."""
    past: Float[Tensor, "B 2 H M C"] | KeyValueCache | None
    """Keys and values of the memory, the keys turned."""
    positions: Any
    """The position term of each sample, such as its mask."""
    drop: Float[Tensor, "B H T K"] | None
    """Dropout mask of the attention weights, which are not renormalised; heads first in memory."""


class Attention(nn.Module):
    """o = softmax(A) V W_o + b_o with A_ij = (q_i + u)·k_j/√C + position term, and [q|k|v] = c W_qkv + [U0; U].

    Rotary positions have no such term: they turn q_i + u and k_j.

    Args:
        width: D, channels of states and inputs.
        heads: H, which divide the width evenly.
        positions: computes the position term and the mask.
        form: "fused" for fused attention where it computes the same function, "auto" where it is also the quicker one,
            "exact" to write the scores to memory.
        dropout: the share of the attention weights to drop.
        weight_norm: normalise the weights W_qkv and W_o.
        norm: apply a layer norm to the heads before W_o.
        affine: give that norm a gain and a bias.
        init: how the matrices start.
        std: the standard deviation of u, and of the matrices with init "normal".
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        positions: Positions,
        form: Form,
        dropout: float,
        weight_norm: bool,
        norm: bool,
        affine: bool,
        init: Init,
        std: float,
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.positions = heads, dropout, positions
        self.form: Form = form
        kind = {"normed": weight_norm, "init": init, "std": std}
        self.qkv = NormedLinear(inputs=width, outputs=3 * width, bias=False, **kind)
        self.out = NormedLinear(inputs=width, outputs=width, **kind)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine) if norm else None
        self.std = std
        self.u = nn.Parameter(torch.empty(heads, width // heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw u again; the matrices draw their own parameters."""
        nn.init.normal_(self.u, std=self.std)

    def weights(self) -> AttentionWeights:
        """The effective weights, with graph."""
        width = self.u.numel()
        qkv, _ = weights_of(self.qkv, inputs=width, like=self.u, bias=False)
        # u and 1/√C concern only the queries: they are folded into their bias and weights.
        scale = torch.ones(3 * width, dtype=qkv.dtype, device=qkv.device)
        scale[:width] = 1 / math.sqrt(width // self.heads)
        return AttentionWeights(
            qkv=qkv * scale.unsqueeze(1),
            scale=scale,
            bias=functional.pad(self.u.flatten(), (0, 2 * width)) * scale,
            out=weights_of(self.out, inputs=width, like=self.u),
        )

    def prepare(
        self,
        x: Float[Tensor, "B T D"],
        injection: Float[Tensor, "B T 3*D"] | None,
        past: Float[Tensor, "2 H B M C"] | KeyValueCache | None,
        *,
        first: int,
        weights: AttentionWeights,
        table: Tensor | None = None,
        key_padding_mask: Bool[Tensor, "B K"] | None = None,
        part: BatchSlice | None = None,
    ) -> Prepared:
        """Shared: ``AttentionShared``. Rows: ``AttentionRows``.

        Args:
            x: gives batch, length, dtype and device.
            injection: U = x W_in + b_in; None for no injection.
            past: keys and values of the memory, as ``keys_and_values`` gives them, or a cache of them.
            first: position of the first row of x, counted as for the keys of the past.
            weights: the result of ``weights``.
            table: the table of ``positions`` for the past and x, or for more keys; computed if None.
            key_padding_mask: True for padding keys. A query sees such a key only if it is at the same position.
            part: the rows of the whole batch that x holds.
        """
        batch, time, _ = x.shape
        length = past.seen if isinstance(past, KeyValueCache) else 0 if past is None else past.shape[3]
        span = {"batch": batch, "queries": time, "memory": length, "like": x, "key_padding_mask": key_padding_mask}
        exact = self.form == "exact" or (self.training and self.dropout > 0)
        fused = None if exact else prepare_fused(self.positions, self.u, if_quicker=self.form == "auto", **span)
        positions = self.positions.prepare(self.u, table=table, **span) if fused is None else fused
        shape = (self.heads, batch, time, length + time)
        drop = dropout_mask(shape, rate=self.dropout, training=self.training, like=x, rows=1, part=part)
        rows = AttentionRows(
            injection=None if injection is None else torch.addcmul(weights.bias, injection, weights.scale),
            past=past.permute(2, 0, 1, 3, 4) if isinstance(past, Tensor) else past,
            positions=positions.rows,
            drop=None if drop is None else drop.transpose(0, 1),
        )
        term = {"positions": positions.shared} if fused is None else {"positions": None, "fused": fused.shared}
        rotation = self.positions.rotation(first=first, count=time, like=x)
        return Prepared(shared=AttentionShared(weights=weights, rotation=rotation, **term), rows=rows)

    def forward(self, x: Float[Tensor, "B T D"], prepared: Prepared) -> Float[Tensor, "B T D"]:
        """The attention output o of the current positions: five matrix products with relative positions, else four."""
        shared, rows = prepared.shared, prepared.rows
        weights, past = shared.weights, rows.past
        qkv = linear(x, weights.qkv, weights.bias if rows.injection is None else rows.injection)
        q, k, v = self._split(qkv)
        if shared.rotation is not None:
            q, k = shared.rotation(q), shared.rotation(k)
        if isinstance(past, KeyValueCache):
            k, v = past.joined(k, v)
        elif past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past.permute(1, 2, 0, 3, 4), (k, v), strict=True))
        if shared.fused is None:
            heads = self._exact(q, k, v, prepared)
        else:
            heads = attend(q, k, v, Prepared(shared=shared.fused, rows=rows.positions))
        heads = heads.flatten(2)
        heads = heads if self.norm is None else self.norm(heads)
        return linear(heads, *weights.out)

    def _exact(
        self,
        q: Float[Tensor, "H B T C"],
        k: Float[Tensor, "H B K C"],
        v: Float[Tensor, "H B K C"],
        prepared: Prepared,
    ) -> Float[Tensor, "B T H C"]:
        shared, rows = prepared.shared, prepared.rows
        positions = Prepared(shared=shared.positions, rows=rows.positions)
        scores = self.positions(q.flatten(0, 1), k.flatten(0, 1), positions)
        drop = None if rows.drop is None else rows.drop.transpose(0, 1).flatten(0, 1)
        attended = masked(softmax(scores), drop)
        heads = torch.bmm(attended, v.flatten(0, 1)).view(*q.shape[:3], -1)
        return heads.permute(1, 2, 0, 3)

    def keys_and_values(
        self,
        x: Float[Tensor, "B L D"],
        injection: Float[Tensor, "B L 3*D"] | None,
        weights: AttentionWeights,
        rotation: Rotation | None,
    ) -> Float[Tensor, "2 H B L C"]:
        """Keys and values of states x under the injection U at the same positions, the keys turned by ``rotation``."""
        width = x.shape[2]
        rows = linear(x, weights.qkv[width:])
        k, v = self._split(rows if injection is None else rows + injection[..., width:])
        return torch.stack([k if rotation is None else rotation(k), v])

    def _split(self, rows: Float[Tensor, "B L SD"]) -> tuple[Float[Tensor, "H B L C"], ...]:
        """Queries, keys or values side by side in one row, into heads.

        They are taken apart before heads come first, so that their gradients are put together in one pass, in the
        layout of the rows.
        """
        batch, length, _ = rows.shape
        parts = rows.view(batch, length, -1, self.heads, self.u.shape[1])
        if not torch.is_grad_enabled():  # the same views, by fewer operators
            return parts.permute(2, 3, 0, 1, 4).unbind(0)
        return tuple(part.permute(2, 0, 1, 3) for part in parts.unbind(2))


def softmax(scores: Float[Tensor, "*shape K"]) -> Float[Tensor, "*shape K"]:
    """The weights of the keys, differentiable any number of times, backwards and forwards.

    Where a weight is smaller than every normal number (1e-38 in float32), it is 0, and so is such a gradient, as far as
    this thread computes them: products with denormal numbers take Intel's processors many times as long.
    """
    if not _may_flush(scores):
        return torch.softmax(scores, dim=-1)
    if torch.is_grad_enabled():
        return _Softmax.apply(scores)  # pyright: ignore[reportReturnType]
    with denormals_are_zero():
        return torch.softmax(scores, dim=-1)


def _may_flush(scores: Tensor) -> bool:
    """True for plain numbers of a CPU, unless only PyTorch's own operator can do what follows."""
    plain = type(scores) is Tensor and scores.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and not (is_traced() or is_forward_mode() or is_transformed())


class _Softmax(torch.autograd.Function):
    """The softmax over the last axis."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        with denormals_are_zero():
            weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (g,), (weights,) = grads, ctx.saved_tensors
        with denormals_are_zero():
            return softmax_backward(g, weights)
