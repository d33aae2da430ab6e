"""The derivative of a solve that autograd records and whose residuals have fallen to the size of rounding errors.

Letters: R samples that are still evaluated, N flattened state.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.core.maps import Autocast
from equilibria.core.solver import Iterate
from equilibria.core.state import Layout
from equilibria.core.stop import row_norm

LEVEL = 10
"""A residual may consist of rounding errors if it is at most so many eps of f(z)."""
FALLEN = 1e-2
"""The derivative has converged with the residual if that has fallen to this fraction of its first value."""


class Rounding:
    """Gives the iterates of samples that are at the level of rounding the derivative of their best iterate.

    The weights of a secant method are quotients of differences between residuals. Where these are rounding errors, the
    iterates stay right, but the derivatives of the weights grow without bound. In exact arithmetic the iterate would
    have converged, and its derivative with it.
    """

    def __init__(self, layout: Layout, autocast: Autocast) -> None:
        eps = [torch.finfo(leaf.dtype).eps for leaf in layout.leaves]
        if autocast.enabled:
            eps = [max(number, torch.finfo(autocast.dtype).eps) for number in eps]
        self._eps: float | Tensor = eps[0]
        if len(set(eps)) > 1:
            columns = torch.tensor(eps, dtype=layout.dtype).repeat_interleave(torch.tensor(layout.sizes))
            self._eps = columns.to(layout.device)
        self._reached: Bool[Tensor, " R"] | None = None
        """True for samples whose residual has stopped falling at the level of rounding."""

    def update(self, z: Float[Tensor, "R N"], fz: Float[Tensor, "R N"], r: Float[Tensor, "R N"]) -> None:
        """Compare the residuals with the rounding of f(z)."""
        residual = row_norm(r.detach())
        if self._reached is None:
            self._first = self._lowest = residual
            self._best, self._reached = z, torch.zeros_like(residual, dtype=torch.bool)
            return
        level = torch.minimum(LEVEL * row_norm(fz.detach() * self._eps), FALLEN * self._first)
        better = residual < self._lowest
        self._reached = self._reached | (~better & (residual <= level))
        self._best = torch.where((better & ~self._reached)[:, None], z, self._best)
        self._lowest = torch.where(better, residual, self._lowest)

    def take(self, index: Int[Tensor, " K"]) -> None:
        """Continue with these samples."""
        if self._reached is not None:
            self._first, self._lowest, self._best = self._first[index], self._lowest[index], self._best[index]
            self._reached = self._reached[index]

    def constant(self, at: Iterate) -> Iterate:
        """The point without derivative for the samples that are at the level of rounding."""
        if self._reached is None or not _may_be_set(self._reached):
            return at
        rows = self._reached[:, None]
        z, fz, r = (torch.where(rows, x.detach(), x) for x in (at.z, at.fz, at.r))
        return Iterate(z=z, fz=fz, r=r, active=at.active)

    def with_derivative(self, proposal: Float[Tensor, "R N"]) -> Float[Tensor, "R N"]:
        """The proposal with the derivative of the best iterate, for the samples at the level of rounding."""
        if self._reached is None or not _may_be_set(self._reached):
            return proposal
        best = self._best - self._best.detach()
        return torch.where(self._reached[:, None], proposal.detach() + best, proposal)


def _may_be_set(flags: Bool[Tensor, " R"]) -> bool:
    """False if no flag is set; always True on a GPU, which is not waited for."""
    return flags.is_cuda or bool(flags.any())
