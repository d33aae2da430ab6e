"""Stage: a part of the training with its own method of solving."""

from __future__ import annotations

import dataclasses
from functools import cached_property

from equilibria.checks import check_at_least, check_fields
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients.unroll import Unroll
from equilibria.lm.experiments.checks import finite
from equilibria.solvers.picard import Picard

SOLVES = ("method", "eval_stop", "depth")
"""Fields that determine how a model is evaluated; stages that agree in them have comparable validations."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training with its own method of solving."""

    name: str
    """The name in logs."""
    steps: int
    """Number of training steps."""
    method: Method | None = None
    """Solver, stopping rule and gradient rule of the equilibrium; None for a model that solves nothing."""
    penalty: float = 0.0
    """Weight γ of the Jacobian penalty ‖εᵀJ‖²/(B·T·D), in nats; 0 for none. z* is treated as constant in it."""
    penalty_share: float = 1.0
    """Probability that a step has the penalty; steps without it have no extra cost."""
    eval_stop: Stop | None = None
    """Tolerances and budget in evaluation; None for those of the training."""
    warm: bool = False
    """Start solves from the last state that the cell remembers of the previous segment, instead of zero."""
    depth: int | None = None
    """Number of layers of an explicit network that this stage trains, from the first; None for all."""
    budget_jitter: int = 0
    """The budget of each training step is reduced by a random number of evaluations, 0 … budget_jitter."""

    def __post_init__(self) -> None:
        check_fields(self)
        finite(self)
        check_at_least(self, steps=1, depth=1)
        if self.penalty < 0:
            raise ValueError(
                f"Stage(penalty={self.penalty}): the weight of the penalty is ≥ 0; try 1.0, or 0 for none."
            )
        if not 0 < self.penalty_share <= 1:
            raise ValueError(f"Stage(penalty_share={self.penalty_share}): a probability is in (0, 1]; try 0.4.")
        if self.method is None:
            self._check_without_method()
            return
        if self.depth is not None:
            raise ValueError(f"Stage(depth={self.depth}, method=…): an equilibrium has no layers; leave one out.")
        budget = self.method.stop.max_evals
        if not 0 <= self.budget_jitter < budget:
            raise ValueError(
                f"Stage(budget_jitter={self.budget_jitter}): a budget of {budget} evaluations can be reduced by 0 to "
                f"{budget - 1}; try 2, or 0 for the same budget in every step."
            )

    def _check_without_method(self) -> None:
        for name in ("penalty", "eval_stop", "warm", "budget_jitter"):
            if getattr(self, name):
                raise ValueError(
                    f"Stage({name}={getattr(self, name)!r}) without a method: it belongs to an equilibrium; give "
                    f"method=Method(…), or leave {name} out."
                )

    @cached_property
    def training_method(self) -> Method | None:
        """The method in training; it does not warn of failures, which the trainer counts and logs."""
        if self.method is None:
            return None
        return dataclasses.replace(self.method, on_failure="ignore", keep_point=self.penalty > 0)

    @cached_property
    def evaluation_method(self) -> Method | None:
        """The method in evaluation."""
        method = self.training_method
        return None if method is None else method.with_stop(self.eval_stop)

    @property
    def layers(self) -> int | None:
        """The depth of the weight-tied network that the stage trains, see ``network_of``; None for a solve."""
        method = self.method
        if method is None or method.stop.has_tolerance or not isinstance(method.gradient, Unroll):
            return None
        return method.stop.max_evals - 1

    def solves_like(self, other: Stage) -> bool:
        """True if both stages solve in the same way, so that their validations are comparable."""
        return all(getattr(self, name) == getattr(other, name) for name in SOLVES)


def network_of(depth: int, *, name: str | None = None, steps: int = 1, checkpoint: bool = False) -> Stage:
    """A stage that trains an equilibrium's cell as a weight-tied network of ``depth`` layers, by back-propagation.

    Args:
        depth: number of layers.
        name: the name of the stage; None for "12 layers".
        steps: number of training steps.
        checkpoint: evaluate each layer again in the backward pass instead of storing what it needs.
    """
    stop = Stop(rtol=0, atol=0, max_evals=depth + 1, best=False)  # the last evaluation is for the residual
    gradient = Unroll(checkpoint=checkpoint)
    return Stage(name=name or f"{depth} layers", steps=steps, method=Method(Picard(), stop, gradient))
