"""Picard: (damped) fixed-point iteration."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.evaluator import Evaluator
from equilibria.core.solver import Iterate, Solver


@dataclasses.dataclass(frozen=True)
class Picard(Solver):
    """z ← (1 − λ)·z + λ·f(z) with damping λ.

    Converges iff the spectral radius of (1 − λ)I + λJ is below 1. Stores nothing.
    """

    damping: float = 1.0
    """λ in (0, 1]; 1 is plain iteration, which is a weight-tied network."""

    by_row: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.damping <= 1:
            raise ValueError(
                f"Picard(damping={self.damping}): the damping lies in (0, 1]; try 1.0, or 0.5 to stabilise."
            )

    def init(self, z: Float[Tensor, "B N"]) -> None:
        """No history."""

    def step(self, f: Evaluator, at: Iterate, history: None) -> tuple[Tensor, None]:
        """(1 − λ)·z + λ·f(z)."""
        return (at.fz if self.damping == 1.0 else at.z.lerp(at.fz, self.damping)), None
