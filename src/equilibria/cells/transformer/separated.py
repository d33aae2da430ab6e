"""The position term of Transformer-XL as a product of queries and keys, for attention that writes no scores.

The term is the product of q_i + v − u and P_δ = W_r r_δ, where r_δ holds sin δω_f and cos δω_f, and δ = i − j with
queries counted from M. With [α | β] = W_rᵀ (q_i + v − u) and the theorems of addition,

    (q_i + v − u)·P_δ = Σ_f (α_f sin iω_f + β_f cos iω_f) cos jω_f + (β_f sin iω_f − α_f cos iω_f) sin jω_f:

D more channels of the query, times D channels of the key that are constant.

Letters: B batch, T queries, M memory, K = M + T keys, D width, H heads, C width of a head, F = D/2 frequencies;
G is H, or 1 for a bias that all heads share.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def angles(distance: Float[Tensor, " N"], width: int) -> Float[Tensor, "N F"]:
    """δω_f for each distance δ, with ω_f = 10000^(−2f/width) (Vaswani et al. 2017)."""
    even = torch.arange(0, width, 2, dtype=distance.dtype, device=distance.device)
    return distance[:, None] * 10000 ** (-even / width)


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The parts of the further channels of queries and keys."""

    projection: Float[Tensor, "H C D"]
    """W_r, head by head."""
    shift: Float[Tensor, "H 1 C"]
    """(v − u)/√C."""
    sines: Float[Tensor, "T F"]
    """sin iω_f of the queries."""
    cosines: Float[Tensor, "T F"]
    """cos iω_f of the queries."""
    keys: Float[Tensor, "K D"]
    """cos jω_f, then sin jω_f, of the keys."""

    @classmethod
    def of(
        cls, projection: Float[Tensor, "H C D"], shift: Float[Tensor, "H 1 C"], *, queries: int, memory: int
    ) -> Channels:
        """The channels of ``queries`` positions after ``memory`` keys, of the dtype of the projection.

        The angles are computed in float64: in float32 an angle of 1000 is off by 3e-5.
        """
        width, device = projection.shape[2], projection.device
        position = torch.arange(memory + queries, dtype=torch.float64, device=device)
        angle = angles(position, width)
        sines, cosines = (wave.to(projection.dtype) for wave in (angle.sin(), angle.cos()))
        return cls(
            projection=projection,
            shift=shift,
            sines=sines[memory:],
            cosines=cosines[memory:],
            keys=torch.cat([cosines, sines], dim=1),
        )

    def of_queries(self, q: Float[Tensor, "H B T C"]) -> tuple[Float[Tensor, "H B T F"], Float[Tensor, "H B T F"]]:
        """The further channels of the queries in two halves; q already contains u and 1/√C."""
        rows = torch.bmm(q.flatten(1, 2) + self.shift, self.projection).view(*q.shape[:3], 2, -1)
        alpha, beta = rows.unbind(3)
        of_cosines = torch.addcmul(alpha * self.sines, beta, self.cosines)
        of_sines = torch.addcmul(beta * self.sines, alpha, self.cosines, value=-1)
        return of_cosines, of_sines


@dataclasses.dataclass(frozen=True, eq=False)
class Separated:
    """A position term in the form that fused attention computes."""

    bias: Float[Tensor, "H K"] | None = None
    """Added to the scores, for the distances K−1, …, 0; None for nothing."""
    channels: Channels | None = None
    """Further channels of queries and keys; None for none."""


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
    """The bias, −∞ also at keys that are padding, which a query of their stream sees only at its own position.

    The axis before the last two of the result is that of the samples.
    """
    queries, keys = bias.shape[-2:]
    key = torch.arange(keys, device=bias.device)
    itself = key[keys - queries :, None] == key
    return bias.masked_fill(key_padding_mask[:, None] & ~itself, -math.inf)
