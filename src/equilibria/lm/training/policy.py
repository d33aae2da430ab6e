"""ConvergencePolicy: the method of each step, and the reaction to steps that do not converge or are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from equilibria.core.solve import Solution
from equilibria.errors import EquilibriaError
from equilibria.fixed_point import Method
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.experiments.training import Training
from equilibria.lm.ranks import Ranks
from equilibria.lm.training.log import Log
from equilibria.lm.training.step import Step

_log = logging.getLogger(__name__)
LARGEST = 8
"""Largest factor by which the budget of a stage can be raised."""


class TrainingStopped(EquilibriaError):
    """The loss or the gradient is not finite, or too many solves fail; the weights are those of the step before."""


class NotFinite(TrainingStopped):
    """The loss or the gradient is not finite."""

    def __init__(self, message: str, *, number: int = 0, loss: float = math.nan, gradient_norm: float = math.nan):
        super().__init__(message)
        self.number = number
        self.numbers = {"loss": loss, "gradient_norm": gradient_norm}


class ConvergencePolicy:
    """Chooses the ``Method`` of each step, and decides whether a step may change the weights.

    Args:
        training: the settings of the training.
        ranks: the processes; they decide together, by the mean over the ranks.
        log: the log, which records each action of the policy.
    """

    def __init__(self, training: Training, ranks: Ranks, log: Log) -> None:
        self._training, self._ranks, self._log = training, ranks, log
        self.factor = 1
        """Factor of the stage's budget."""
        self.rollbacks = 0
        """Number of times that the run has returned to a checkpoint."""

    def method(self, stage: Stage) -> Method | None:
        """The stage's method in training, with the raised budget, forward and backward."""
        return self._raised(stage.training_method)

    def evaluation_method(self, stage: Stage) -> Method | None:
        """The stage's method in evaluation, with the raised budget."""
        return self._raised(stage.evaluation_method)

    @property
    def rate_factor(self) -> float:
        """Factor of the learning rate, which is halved by each roll-back."""
        return 0.5**self.rollbacks

    @property
    def may_roll_back(self) -> bool:
        """True if the run may return to a checkpoint once more."""
        return self.rollbacks < self._training.faults.rollbacks

    def state(self) -> dict[str, int]:
        """Plain values for a checkpoint."""
        return {"rollbacks": self.rollbacks, "budget_factor": self.factor}

    def note_end(self, error: NotFinite, *, stage: Stage) -> None:
        """Log the error that ends the training."""
        self._log.write("stopped", step=error.number, stage=stage.name, **error.numbers)

    def note_rollback(self, error: NotFinite, *, step: int, stage: Stage) -> None:
        """Log and warn that the training continues from the checkpoint of ``step``, with half the learning rate."""
        about = {"failed_step": error.number, "factor": self.rate_factor, **error.numbers}
        self._log.write("rolled_back", step=step, stage=stage.name, **about)
        _log.warning(
            "Step %d was not finite: continuing from the checkpoint of step %d with %g times the learning rate.",
            *(error.number, step, self.rate_factor),
        )

    def raise_budget(self) -> None:
        """Double the budget from the next step on, up to ``LARGEST`` times that of the stage."""
        self.factor = min(2 * self.factor, LARGEST)

    def check_finite(self, step: Step, *, number: int, stage: Stage, last: Callable[[], str]) -> None:
        """Raise ``NotFinite`` unless loss and gradient are finite; ``last`` names the last checkpoint."""
        if bool(torch.isfinite(step.loss) & torch.isfinite(step.gradient_norm)):
            return
        fault, optimisation = "gradient" if math.isfinite(step.loss) else "loss", self._training.optimisation
        raise NotFinite(
            f"Step {number} (stage {stage.name!r}): the {fault} is not finite, and the weights were not "
            f"changed; start again with a lower --training.learning-rate than {optimisation.learning_rate:g}, "
            f"a smaller --training.clip or a Jacobian penalty; {last()}.",
            number=number,
            loss=float(step.loss),
            gradient_norm=float(step.gradient_norm),
        )

    def accepts(self, step: Step, *, number: int, stage: Stage, last: Callable[[], str]) -> bool:
        """True if the step may change the weights; applies ``Faults.unconverged`` if too many solves failed.

        Raises:
            TrainingStopped: too many solves failed, and ``Faults.unconverged`` is "stop".
        """
        share, faults = self._share_of_failures(step.solutions, stage), self._training.faults
        if share is None or share <= faults.tolerated:
            return True
        self._log.write("unconverged", step=number, stage=stage.name, share=share, policy=faults.unconverged)
        if faults.unconverged == "raise_budget":
            self.raise_budget()
        if faults.unconverged == "stop":
            self._log.write("stopped", step=number, stage=stage.name)
            raise TrainingStopped(
                f"Step {number} (stage {stage.name!r}): {share:.0%} of the samples did not converge, and "
                f"{faults.tolerated:.0%} are tolerated; raise the stage's budget (stop.max_evals) or its tolerance, "
                f"add a Jacobian penalty, or choose another --training.unconverged; {last()}."
            )
        return faults.unconverged != "skip_step"

    def _raised(self, method: Method | None) -> Method | None:
        return method if method is None or self.factor == 1 else method.with_budget(self.factor)

    def _share_of_failures(self, solutions: tuple[Solution, ...], stage: Stage) -> float | None:
        """Share of all ranks' samples whose forward or backward solve failed; None if the policy does not need it."""
        if stage.method is None or not stage.method.stop.has_tolerance or not solutions:
            return None
        if self._training.faults.unconverged == "continue":
            return None
        solves = [solve for solution in solutions for solve in (solution, *solution.adjoint[-1:])]
        failed = torch.stack([(~solve.converged).double().mean() for solve in solves]).mean()
        return float(self._ranks.mean(failed))
