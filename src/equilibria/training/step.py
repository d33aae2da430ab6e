"""Step: what one training step gives back."""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from equilibria.solve import Solution


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What one training step gives back: tensors, so that nobody waits for the device unless the numbers are read."""

    loss: Float[Tensor, ""]
    """Mean nats per token, without what is added to it."""
    extra: Float[Tensor, ""] | None
    """What the model's own losses in training have added, weighted; None if it has none."""
    penalty: Float[Tensor, ""] | None
    """Jacobian penalty without its weight; None if the step had none."""
    gradient_norm: Float[Tensor, ""]
    """Euclidean norm of the whole gradient before clipping."""
    learning_rate: float
    """The rate of this step."""
    tokens: int
    """Tokens that were scored."""
    solution: Solution | None
    """How the forward solve went, and in its ``adjoint`` the backward one; None without an equilibrium."""
