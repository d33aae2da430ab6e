"""Broyden's method, stored as its steps alone.

Letters: B batch, N flattened state, W stored steps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.evaluator import Evaluator
from equilibria.core.solver import History, Iterate, Solver
from equilibria.core.trees import take_rows
from equilibria.solvers.history import (
    TINY,
    bordered,
    check_history_dtype,
    combine,
    dot,
    empty_window,
    inner,
    quotient,
    selected,
    small_dtype,
    stored,
    vector_at,
)


@dataclasses.dataclass(frozen=True, eq=False)
class BroydenHistory:
    """The steps s_0, …, s_k, which define −H = F_{k−1} ⋯ F_0 with F_j = I + w_j s_{j+1} s_jᵀ."""

    count: int
    """k + 1; 0 before the first step."""
    steps: Float[Tensor, "B W N"]
    gram: Float[Tensor, "B W W"]
    """Inner products of the steps."""
    weights: Float[Tensor, "B W"]
    """w_j = 1/‖s_j‖²; 0 where an update was skipped."""

    def apply(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """−H x = x + Σ_j a_j s_{j+1}, where a_j = w_j (s_jᵀx + Σ_{i<j} a_i s_jᵀs_{i+1})."""
        k = self.count - 1
        if k == 0:
            return x
        products = self.weights[:, :k] * inner(self.steps[:, :k], x)
        a = torch.linalg.solve_triangular(
            self._system(k), products[..., None], upper=False, left=True, unitriangular=True
        )
        return combine(a[..., 0], self.steps[:, 1 : k + 1], onto=x)

    def apply_transposed(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """−Hᵀx = x + Σ_j b_j s_j, the estimate of (I − J)⁻ᵀ x; b_j = w_j (s_{j+1}ᵀx + Σ_{i>j} b_i s_iᵀs_{j+1})."""
        k = self.count - 1
        if k < 1:
            return x
        # With b = w ⊙ b' the system is that of ``apply``, transposed.
        products = inner(self.steps[:, 1 : k + 1], x).to(self.gram.dtype)
        b = torch.linalg.solve_triangular(
            self._system(k).mT, products[..., None], upper=True, left=True, unitriangular=True
        )
        return combine(self.weights[:, :k] * b[..., 0], self.steps[:, :k], onto=x)

    def _system(self, k: int) -> Float[Tensor, "B k k"]:
        """Entry (j, i) of the unit lower triangle: −w_j s_jᵀs_{i+1}; entries above the diagonal are not read."""
        return self.weights[:, :k, None] * -self.gram[:, :k, 1 : k + 1]


@dataclasses.dataclass(frozen=True, eq=False)
class DenseHistory:
    """−H itself, for samples of a few numbers, and the last point."""

    inverse: Float[Tensor, "B N N"]
    z: Float[Tensor, "B N"]
    r: Float[Tensor, "B N"]

    def apply(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """−H x."""
        return _times(self.inverse, x)

    def apply_transposed(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """−Hᵀx, the estimate of (I − J)⁻ᵀ x."""
        return _times(self.inverse.mT, x)


@dataclasses.dataclass(frozen=True)
class Broyden(Solver):
    """z ← z − H·r,  H ← H + (Δz − HΔr)(HᵀΔz)ᵀ / (Δzᵀ HΔr),  r = f(z) − z,  H₀ = −I.

    Good Broyden in inverse form: C. G. Broyden (Math. Comp. 19, 1965); as in Bai, Kolter, Koltun (2019, §3.1.3). Only
    the steps are stored: C. T. Kelley, "Iterative Methods for Linear and Nonlinear Equations" (1995, §7.3). Since each
    step s is −H·r, the next one is q/(1 − sᵀq/‖s‖²) with q = −H·r by the old H, and H is a product of I + s₊sᵀ/‖s‖².
    Deviations: (1) a product with H takes two passes over the steps and a triangular system of their inner products in
    float64; (2) after ``rank`` updates H is reset to −I, and the next step is a plain one; (3) an update whose
    denominator is below 1e-12 of its terms, or not finite, is skipped for that sample; (4) no line search.
    """

    rank: int = 20
    """Number of updates before H is reset to −I; rank + 1 states are stored."""
    history_dtype: torch.dtype | None = None
    """Dtype of the steps: ``torch.bfloat16`` halves their memory, and the iterate moves by the rounded step. None for
    the dtype of the algebra."""

    by_row: ClassVar[bool] = True
    secant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rank < 1:
            raise ValueError(f"Broyden(rank={self.rank}): at least 1 update is needed; try 20, or use Picard().")
        check_history_dtype("Broyden", self.history_dtype)

    def init(self, z: Float[Tensor, "B N"]) -> BroydenHistory | DenseHistory:
        """H = −I."""
        if z.shape[1] <= min(TINY, self.rank) and self.history_dtype is None:
            identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            return DenseHistory(inverse=identity.expand(len(z), -1, -1), z=z, r=z)
        steps = empty_window(z, self.rank + 1, dtype=self.history_dtype)
        gram = torch.zeros(len(z), self.rank + 1, self.rank + 1, dtype=small_dtype(z), device=z.device)
        return BroydenHistory(count=0, steps=steps, gram=gram, weights=gram[:, 0].clone())

    def step(self, f: Evaluator, at: Iterate, history: History) -> tuple[Tensor, History]:
        """z − H·r after the update of H; the first step is a plain one."""
        if isinstance(history, DenseHistory):
            return _dense_step(at, history)
        h, z = history, at.z
        rounded = h.steps.dtype != z.dtype
        if h.count == 0 or h.count > self.rank:
            following = _lengthened(dataclasses.replace(h, count=0), at.r, h.weights)
            return (z + vector_at(following.steps, 0, z.dtype) if rounded else at.fz), following
        last, q = h.count - 1, h.apply(at.r)
        size = h.gram[:, last, last]
        along = dot(vector_at(h.steps, last, q.dtype), q).to(size.dtype)
        denominator = size - along
        sound = at.active & (size > 0) & torch.isfinite(denominator)
        sound = sound & (denominator.abs() > 1e-12 * (size + along.abs()))
        factor = torch.where(sound, size / torch.where(sound, denominator, 1.0), 1.0)
        weights = h.weights.clone()
        weights[:, last] = torch.where(sound, 1 / torch.where(sound, size, 1.0), 0.0)
        factor = factor.to(q.dtype)[:, None]
        s = q * factor if torch.is_grad_enabled() else q.mul_(factor)
        following = _lengthened(h, s, weights)
        return z + (vector_at(following.steps, h.count, z.dtype) if rounded else s), following

    def select(self, history: History, rows: Int[Tensor, " R"]) -> History:
        """The history of these samples; their steps stay in the same storage."""
        if isinstance(history, DenseHistory):
            return take_rows(history, rows)
        parts = {"gram": history.gram[rows], "weights": history.weights[rows]}
        return dataclasses.replace(history, steps=selected(history.steps, rows), **parts)


def _dense_step(at: Iterate, h: DenseHistory) -> tuple[Tensor, DenseHistory]:
    """z − H·r after the update −H ← −H + (s + −H·y)(−Hᵀs)ᵀ / −sᵀ(−H·y) with s = Δz and y = Δr."""
    s, moved = at.z - h.z, h.apply(at.r - h.r)  # before the first step s is 0, and H stays −I
    terms = s * moved
    along = -terms.sum(dim=1, keepdim=True)
    if s.shape[1] > 1:  # a single term cannot cancel
        sound = along.abs() > 1e-12 * terms.abs().sum(dim=1, keepdim=True)
        along = along * sound  # 0 skips the update
    inverse = h.inverse + quotient((s + moved)[:, :, None] * h.apply_transposed(s)[:, None, :], along[:, :, None])
    return at.z + _times(inverse, at.r), DenseHistory(inverse=inverse, z=at.z, r=at.r)


def _times(matrices: Float[Tensor, "B N N"], x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """The matrix–vector product of each sample, column by column: for small matrices faster than ``bmm``."""
    columns = zip(matrices.unbind(2), x.split(1, dim=1), strict=True)
    return functools.reduce(torch.add, (column * number for column, number in columns))


def _lengthened(h: BroydenHistory, s: Float[Tensor, "B N"], weights: Tensor) -> BroydenHistory:
    """The history with one more step."""
    k = h.count
    steps = stored(h.steps, k, s)
    gram = bordered(h.gram, k, inner(steps[:, : k + 1], vector_at(steps, k, s.dtype)))
    return BroydenHistory(count=k + 1, steps=steps, gram=gram, weights=weights)
