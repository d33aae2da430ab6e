"""Anderson acceleration.

Letters: B batch, N flattened state, W window.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.solve import Evaluator, Solver
from equilibria.solvers.window import bordered, combine, empty_window, inner, ridge_solve, selected, small_dtype, stored


@dataclasses.dataclass(frozen=True, eq=False)
class AndersonHistory:
    """The last pair and the differences between successive pairs, oldest overwritten first."""

    step: int
    z: Float[Tensor, "B N"]
    g: Float[Tensor, "B N"]
    moves: Float[Tensor, "B W N"]
    """Δz_i + β·Δg_i."""
    dg: Float[Tensor, "B W N"]
    """Δg_i."""
    gram: Float[Tensor, "B W W"]


@dataclasses.dataclass(frozen=True)
class Anderson(Solver):
    """z ← z + β·g − Σ_i γ_i (Δz_i + β·Δg_i),  γ = argmin ‖g − Σ_i γ_i Δg_i‖² + λ·Σ_i γ_i²‖Δg_i‖²,  g = f(z) − z.

    Type II, D. G. Anderson (1965), in the difference form of H. F. Walker and P. Ni (SIAM J. Numer. Anal. 49, 2011,
    eq. 2.2). Deviations: (1) the ridge λ is relative to the length of each difference, so that it neither stops
    convergence near the solution nor depends on the scale of the state, and as it grows the step becomes plain
    iteration; (2) the Gram matrix is kept in float64 and gains one row a step.
    """

    window: int = 6
    """Number of pairs (z, f(z)) that are combined; memory is 2·window states."""
    mixing: float = 1.0
    """β: how far the step goes along the combined residual."""
    ridge: float = 1e-7
    """λ: relative Tikhonov regularisation of the least-squares problem."""

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"Anderson(window={self.window}): at least 2 pairs are combined; try 6, or use Picard().")
        if not 0 < self.mixing <= 2:
            raise ValueError(f"Anderson(mixing={self.mixing}): the mixing lies in (0, 2]; try 1.0.")
        if self.ridge < 0:
            raise ValueError(f"Anderson(ridge={self.ridge}): a ridge is ≥ 0; try 1e-7.")

    def init(self, z: Float[Tensor, "B N"]) -> AndersonHistory:
        """Empty differences."""
        size = self.window - 1
        gram = torch.zeros(len(z), size, size, dtype=small_dtype(z), device=z.device)
        return AndersonHistory(step=0, z=z, g=z, moves=empty_window(z, size), dg=empty_window(z, size), gram=gram)

    def step(
        self, f: Evaluator, z: Float[Tensor, "B N"], fz: Float[Tensor, "B N"], history: AndersonHistory
    ) -> tuple[Tensor, AndersonHistory]:
        """The mixture of the window; plain iteration from the first pair."""
        h, g = history, fz - z
        plain = z.lerp(fz, self.mixing) if self.mixing != 1.0 else fz
        if h.step == 0:
            return plain, dataclasses.replace(h, step=1, z=z, g=g)
        slot, used = (h.step - 1) % (self.window - 1), min(h.step, self.window - 1)
        newest = g - h.g
        dg = stored(h.dg, slot, newest)
        moves = stored(h.moves, slot, torch.add(z - h.z, newest, alpha=self.mixing))
        row = inner(dg[:, :used], newest)
        gram = bordered(h.gram, slot, row)
        target = inner(dg[:, :used], g).to(gram.dtype)
        gamma = ridge_solve(gram[:, :used, :used], target, ridge=self.ridge).to(z.dtype)
        following = AndersonHistory(step=h.step + 1, z=z, g=g, moves=moves, dg=dg, gram=gram)
        return plain - combine(gamma, moves[:, :used]), following

    def select(self, history: AndersonHistory, rows: Int[Tensor, " R"]) -> AndersonHistory:
        """The same for these samples, their differences in the place where they were."""
        windows = {"moves": selected(history.moves, rows), "dg": selected(history.dg, rows)}
        parts = {"z": history.z[rows], "g": history.g[rows], "gram": history.gram[rows]}
        return dataclasses.replace(history, **windows, **parts)
