"""ConvergencePolicy: how a stage is solved, and what is done when the solves of a training step do not converge."""

from __future__ import annotations

import torch

from equilibria.core.solve import Solution
from equilibria.fixed_point import Method
from equilibria.training.experiment import Stage
from equilibria.training.ranks import Ranks
from equilibria.training.settings import Training

LARGEST = 8
"""Times the stage's budget that a raised one has at most."""


class ConvergencePolicy:
    """Gives the ``Method`` of each step, and applies ``Training.unconverged`` to the steps of a training.

    Args:
        training: the policy, and the share of samples that may fail.
        ranks: all of them decide alike, by the mean of their shares.
    """

    def __init__(self, training: Training, ranks: Ranks) -> None:
        self._training, self._ranks = training, ranks
        self.factor = 1
        """Times the budget of the stage that is spent now."""

    def method(self, stage: Stage) -> Method | None:
        """How the stage is solved in training, with the raised budget, forward and backward."""
        return self._raised(stage.training_method)

    def evaluation_method(self, stage: Stage) -> Method | None:
        """How the stage is solved in evaluation, with the raised budget."""
        return self._raised(stage.evaluation_method)

    def _raised(self, method: Method | None) -> Method | None:
        return method if method is None or self.factor == 1 else method.with_budget(self.factor)

    def share_of_failures(self, solutions: tuple[Solution, ...], stage: Stage) -> float | None:
        """Share of the samples of all ranks whose solve, forward or backward, failed; None if no policy reads it."""
        if stage.method is None or not stage.method.stop.has_tolerance or not solutions:
            return None
        if self._training.unconverged == "continue":
            return None
        solves = [solve for solution in solutions for solve in (solution, *solution.adjoint[-1:])]
        failed = torch.stack([(~solve.converged).double().mean() for solve in solves]).mean()
        return float(self._ranks.mean(failed))

    def too_many(self, share: float | None) -> bool:
        """True if the policy is to act."""
        return share is not None and share > self._training.tolerated

    def raise_budget(self) -> None:
        """Double the budget from the next step on, up to ``LARGEST`` times that of the stage."""
        self.factor = min(2 * self.factor, LARGEST)
