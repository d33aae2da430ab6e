"""Broyden's method.

Letters: B batch, N flattened state, W columns of the low-rank inverse.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.solve import Evaluator, Solver, row_norm
from equilibria.solvers.window import combine, dot, empty_window, inner, stored


@dataclasses.dataclass(frozen=True, eq=False)
class BroydenHistory:
    """The inverse H = −I + U Vᵀ, and the last point with its residual g and step p = −H g."""

    columns: int
    z: Float[Tensor, "B N"]
    g: Float[Tensor, "B N"]
    p: Float[Tensor, "B N"]
    u: Float[Tensor, "B W N"]
    v: Float[Tensor, "B W N"]

    def apply_transposed(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """−Hᵀx = x − V(Uᵀx), the estimate of (I − J)⁻ᵀ x."""
        u, v = self.u[:, : self.columns], self.v[:, : self.columns]
        return x - combine(inner(u, x), v)


@dataclasses.dataclass(frozen=True)
class Broyden(Solver):
    """z ← z − H·g,  H ← H + (Δz − HΔg)(HᵀΔz)ᵀ / (Δzᵀ HΔg),  g = f(z) − z,  H₀ = −I.

    Good Broyden in inverse form: C. G. Broyden (Math. Comp. 19, 1965); as in Bai, Kolter, Koltun (2019, §3.1.3).
    Deviations: (1) when ``memory`` columns are full, H starts anew from −I and the latest pair (overwriting old columns
    would not be a Broyden matrix); (2) an update whose denominator is below 1e-12 of its factors, or not finite, is
    skipped for that sample; (3) no line search; (4) H·g is computed once a step and gives both HΔg and the next step.
    """

    memory: int = 20
    """Columns of H before it starts anew; memory is 2·memory states."""

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"Broyden(memory={self.memory}): at least 1 column is kept; try 20, or use Picard().")

    def init(self, z: Float[Tensor, "B N"]) -> BroydenHistory:
        """H = −I."""
        u, v = empty_window(z, self.memory), empty_window(z, self.memory)
        return BroydenHistory(columns=-1, z=z, g=z, p=z, u=u, v=v)

    def step(
        self, f: Evaluator, z: Float[Tensor, "B N"], fz: Float[Tensor, "B N"], history: BroydenHistory
    ) -> tuple[Tensor, BroydenHistory]:
        """z − H·g after the update of H; plain iteration from the first point."""
        h, g = history, fz - z
        if h.columns < 0:
            return fz, dataclasses.replace(h, columns=0, z=z, g=g, p=g)
        dz, dg = z - h.z, g - h.g
        if h.columns == self.memory:
            k, hg, hdg, v = 0, -g, -dg, -dz
        else:
            k = h.columns
            old_u, old_v = h.u[:, :k], h.v[:, :k]
            hg = combine(inner(old_v, g), old_u) - g if k else -g
            hdg = hg + h.p
            v = combine(inner(old_u, dz), old_v) - dz if k else -dz
        u = self._scaled(dz - hdg, dot(v, dg), row_norm(v) * row_norm(dg), f.active)
        p = -hg - u * dot(v, g)[:, None]
        new_u, new_v = stored(h.u, k, u), stored(h.v, k, v)
        return z + p, BroydenHistory(columns=k + 1, z=z, g=g, p=p, u=new_u, v=new_v)

    @staticmethod
    def _scaled(u: Tensor, denominator: Tensor, size: Tensor, active: Tensor) -> Tensor:
        """u / denominator, or 0 where the update is unsafe or the sample is done."""
        sound = active & torch.isfinite(denominator) & (denominator.abs() > 1e-12 * size)
        return torch.where(sound[:, None], u / torch.where(sound, denominator, 1.0)[:, None], 0.0)
