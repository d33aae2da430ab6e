"""Anderson acceleration.

Letters: B batch, N flattened state, W window.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.evaluator import Evaluator
from equilibria.core.solver import Iterate, Solver
from equilibria.solvers.history import (
    TINY,
    check_history_dtype,
    combine,
    empty_window,
    quotient,
    selected,
    stored_difference,
)
from equilibria.solvers.normal import Normal, empty_normal


@dataclasses.dataclass(frozen=True, eq=False)
class AndersonHistory:
    """The last residual, and the differences between successive pairs (z, f(z)); the oldest is overwritten first."""

    step: int
    plain: Float[Tensor, "B N"]
    """z + β·r, the plain step from the last point."""
    r: Float[Tensor, "B N"]
    moves: Float[Tensor, "B W N"]
    """Δz_i + β·Δr_i."""
    dr: Float[Tensor, "B W N"]
    """Δr_i."""
    normal: Normal
    """Inner products of the Δr_i with each other, and with the last residual."""


@dataclasses.dataclass(frozen=True)
class Anderson(Solver):
    """z ← z + β·r − Σ_i γ_i (Δz_i + β·Δr_i),  γ = argmin ‖r − Σ_i γ_i Δr_i‖² + λ·Σ_i γ_i²‖Δr_i‖²,  r = f(z) − z.

    Type II, D. G. Anderson (1965), in the difference form of H. F. Walker and P. Ni (SIAM J. Numer. Anal. 49, 2011,
    eq. 2.2). Deviations: (1) the ridge λ is relative to the length of each difference, so that it neither stops
    convergence near the solution nor depends on the scale of the state, and as it grows the step becomes plain
    iteration; (2) the Gram matrix is kept in float64 and gains one row per step; (3) a state of N numbers has at most N
    differences, since more would be linearly dependent.
    """

    window: int = 6
    """Number of pairs (z, f(z)) that are combined, at most N + 1; 2·window states are stored."""
    mixing: float = 1.0
    """β: how far the step goes along the combined residual."""
    ridge: float = 1e-7
    """λ: relative Tikhonov regularisation of the least-squares problem."""
    history_dtype: torch.dtype | None = None
    """Dtype of the window: ``torch.bfloat16`` halves its memory, and the algebra keeps its own dtype. None for the
    dtype of the algebra."""

    by_row: ClassVar[bool] = True
    secant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window < 2:
            raise ValueError(f"Anderson(window={self.window}): at least 2 pairs are combined; try 6, or use Picard().")
        if not 0 < self.mixing <= 2:
            raise ValueError(f"Anderson(mixing={self.mixing}): the mixing lies in (0, 2]; try 1.0.")
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"Anderson(ridge={self.ridge}): a ridge is a finite number ≥ 0; try 1e-7.")
        check_history_dtype("Anderson", self.history_dtype)

    def init(self, z: Float[Tensor, "B N"]) -> AndersonHistory:
        """A history without differences."""
        size = min(self.window - 1, z.shape[1]) if z.shape[1] > 1 else 0  # see ``_secant``
        return AndersonHistory(
            step=0,
            plain=z,
            r=z,
            moves=empty_window(z, size, dtype=self.history_dtype),
            dr=empty_window(z, size, dtype=self.history_dtype),
            normal=empty_normal(z, size),
        )

    def step(self, f: Evaluator, at: Iterate, history: AndersonHistory) -> tuple[Tensor, AndersonHistory]:
        """The combination of the window; the first step is a plain one."""
        h, r = history, at.r
        plain = at.z.lerp(at.fz, self.mixing) if self.mixing != 1.0 else at.fz
        if r.shape[1] == 1:
            return self._secant(h, plain, r)
        if h.step == 0:
            return plain, dataclasses.replace(h, step=1, plain=plain, r=r)
        size = h.dr.shape[1]
        slot, used = (h.step - 1) % size, min(h.step, size)
        dr = stored_difference(h.dr, slot, r, h.r)
        moves = stored_difference(h.moves, slot, plain, h.plain)
        filled = (dr, moves) if used == size else (dr[:, :used], moves[:, :used])
        normal = h.normal.updated(filled[0], slot, r)
        weights = normal.weights(ridge=self.ridge, tiny=r.shape[1] <= TINY, like=r)
        following = AndersonHistory(step=h.step + 1, plain=plain, r=r, moves=moves, dr=dr, normal=normal)
        return combine(weights, filled[1], onto=plain), following

    def _secant(self, h: AndersonHistory, plain: Tensor, r: Tensor) -> tuple[Tensor, AndersonHistory]:
        """The step for samples of one number: the latest difference determines γ, so no window is needed."""
        following = dataclasses.replace(h, step=h.step + 1, plain=plain, r=r)
        if h.step == 0:
            return plain, following
        gamma = quotient(r, r - h.r)
        return torch.addcmul(plain, gamma, plain - h.plain, value=-1 / (1 + self.ridge)), following

    def select(self, history: AndersonHistory, rows: Int[Tensor, " R"]) -> AndersonHistory:
        """The history of these samples; their differences stay in the same storage."""
        windows = {"moves": selected(history.moves, rows), "dr": selected(history.dr, rows)}
        parts = {name: getattr(history, name)[rows] for name in ("plain", "r")}
        return dataclasses.replace(history, normal=history.normal.select(rows), **windows, **parts)
