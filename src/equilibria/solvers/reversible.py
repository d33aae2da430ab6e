"""The reversible iteration: two coupled states, so that every step can be undone.

Letters: B batch, N flattened state.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.evaluator import Evaluator
from equilibria.core.solver import Iterate, Solver


@dataclasses.dataclass(frozen=True)
class Reversible(Solver):
    """y' = (1 − β)·y + β·f(z),  z' = (1 − β)·z + β·f(y')  from y = z = z₀.

    S. McCallum, K. Arora, J. Foster, "Reversible Deep Equilibrium Models" (2025). Each step costs two evaluations and
    is inverted exactly by ``ReversibleGradient``.
    """

    relaxation: float = 0.8
    """β in (0, 2), not 1. Undoing a step multiplies rounding errors by 1/|1 − β| to 1/(1 − β)²."""
    cost: ClassVar[int] = 2
    plain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.relaxation < 2 or self.relaxation == 1:
            raise ValueError(
                f"Reversible(relaxation={self.relaxation}): the relaxation lies in (0, 2) and is not 1, where a step "
                "cannot be undone; try 0.8, or 0.5 for more accurate inversion."
            )

    def init(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """The second state y = z₀."""
        return z

    def step(self, f: Evaluator, at: Iterate, history: Float[Tensor, "B N"]) -> tuple[Tensor, Tensor]:
        """(z', y')."""
        beta = self.relaxation
        y = torch.where(at.active[:, None], history.lerp(at.fz, beta), history)
        return at.z.lerp(f(f.rounded(y)), beta), y
