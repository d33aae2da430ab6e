"""Step: what one training step gives back."""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from equilibria.core.solve import Solution


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What one training step gives back: tensors, so that nobody waits for the device unless the numbers are read."""

    loss: Float[Tensor, ""]
    """Mean nats per token of all ranks, without what is added to it."""
    extra: Float[Tensor, ""] | None
    """What the model's own losses in training have added, weighted; None if it has none."""
    penalty: Float[Tensor, ""] | None
    """Jacobian penalty without its weight; None if the step had none."""
    gradient_norm: Float[Tensor, ""]
    """Euclidean norm of the whole gradient before clipping."""
    learning_rate: float
    """The rate of this step."""
    tokens: int
    """Tokens that all ranks have scored."""
    solutions: tuple[Solution, ...]
    """How the forward solves of this rank went, one a part of the batch, and in their ``adjoint`` the backward ones;
    none without an equilibrium."""

    @property
    def solution(self) -> Solution | None:
        """The last of them."""
        return self.solutions[-1] if self.solutions else None

    @property
    def adjoints(self) -> tuple[Solution, ...]:
        """The solutions of the backward solves."""
        return tuple(solution.adjoint[-1] for solution in self.solutions if solution.adjoint)
