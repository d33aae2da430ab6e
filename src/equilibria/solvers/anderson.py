"""Anderson acceleration.

Letters: B batch, N flattened state, W window.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from equilibria.solve import Evaluator, Solver
from equilibria.solvers.window import (
    at,
    bordered,
    combine,
    dot,
    empty_window,
    inner,
    ridge_solve,
    selected,
    small_dtype,
    stored_difference,
)


@dataclasses.dataclass(frozen=True, eq=False)
class AndersonHistory:
    """The last g, and the differences between successive pairs, oldest overwritten first."""

    step: int
    plain: Float[Tensor, "B N"]
    """z + β·g, where plain iteration would have gone from the last point."""
    g: Float[Tensor, "B N"]
    moves: Float[Tensor, "B W N"]
    """Δz_i + β·Δg_i."""
    dg: Float[Tensor, "B W N"]
    """Δg_i."""
    gram: Float[Tensor, "B W W"]
    """Inner products of the Δg_i."""
    along: Float[Tensor, "B W"]
    """Inner products of the Δg_i with the last g."""


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
    half: bool = False
    """Keep the window in bfloat16, which halves its memory; the algebra stays as it is."""

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
        return AndersonHistory(
            step=0,
            plain=z,
            g=z,
            moves=empty_window(z, size, half=self.half),
            dg=empty_window(z, size, half=self.half),
            gram=gram,
            along=gram[:, 0].clone(),
        )

    def step(
        self, f: Evaluator, z: Float[Tensor, "B N"], fz: Float[Tensor, "B N"], history: AndersonHistory
    ) -> tuple[Tensor, AndersonHistory]:
        """The mixture of the window; plain iteration from the first pair."""
        h, g = history, f.gap
        plain = z.lerp(fz, self.mixing) if self.mixing != 1.0 else fz
        if h.step == 0:
            return plain, dataclasses.replace(h, step=1, plain=plain, g=g)
        slot, used = (h.step - 1) % (self.window - 1), min(h.step, self.window - 1)
        dg = stored_difference(h.dg, slot, g, h.g)
        moves = stored_difference(h.moves, slot, plain, h.plain)
        along = inner(dg[:, :used], g).to(h.gram.dtype)
        # Δg_iᵀΔg = Δg_iᵀg − Δg_iᵀg₋, both known, but for the new one with itself: one pass over the window is saved.
        row = along - h.along[:, :used]
        newest = at(dg, slot, g.dtype)
        size = dot(newest, newest).to(row.dtype)[:, None]
        gram = bordered(h.gram, slot, torch.cat([row[:, :slot], size, row[:, slot + 1 :]], dim=1))
        gamma = ridge_solve(gram[:, :used, :used], along, ridge=self.ridge).to(z.dtype)
        following = AndersonHistory(
            step=h.step + 1,
            plain=plain,
            g=g,
            moves=moves,
            dg=dg,
            gram=gram,
            along=functional.pad(along, (0, h.along.shape[1] - used)),
        )
        return combine(-gamma, moves[:, :used], onto=plain), following

    def select(self, history: AndersonHistory, rows: Int[Tensor, " R"]) -> AndersonHistory:
        """The same for these samples, their differences in the place where they were."""
        windows = {"moves": selected(history.moves, rows), "dg": selected(history.dg, rows)}
        parts = {name: getattr(history, name)[rows] for name in ("plain", "g", "gram", "along")}
        return dataclasses.replace(history, **windows, **parts)
