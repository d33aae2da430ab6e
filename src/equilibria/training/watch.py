"""What is done when the solves of a training step do not converge."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from equilibria.equilibrium import Equilibrium
from equilibria.solve import Solution
from equilibria.training.experiment import Stage
from equilibria.training.ranks import Ranks
from equilibria.training.settings import Training

LARGEST = 8
"""Times the stage's budget that a raised one has at most."""


class Watch:
    """Applies ``Training.unconverged`` to the steps of a training.

    Args:
        training: the policy, and the share of samples that may fail.
        ranks: all of them decide alike, by the mean of their shares.
    """

    def __init__(self, training: Training, ranks: Ranks) -> None:
        self._training, self._ranks = training, ranks
        self.factor = 1
        """Times the budget of the stage that is spent now."""

    def share_of_failures(self, solutions: tuple[Solution, ...], stage: Stage) -> float | None:
        """Share of the samples of all ranks whose solve, forward or backward, failed; None if nobody asks for it."""
        if self._training.unconverged == "continue" or not stage.stop.has_tolerance or not solutions:
            return None
        solves = [solve for solution in solutions for solve in (solution, *solution.adjoint[-1:])]
        failed = torch.stack([(~solve.converged).double().mean() for solve in solves]).mean()
        return float(self._ranks.mean(failed))

    def too_many(self, share: float | None) -> bool:
        """Whether the policy is to act."""
        return share is not None and share > self._training.tolerated

    def raise_budget(self) -> bool:
        """Double the budget from the next step on; False where it is as large as it gets."""
        raised = self.factor < LARGEST
        self.factor = min(2 * self.factor, LARGEST)
        return raised

    def apply_to(self, layer: nn.Module) -> None:
        """Let the layer, as its stage has set it, spend the raised budget, forward and backward."""
        if self.factor == 1 or not isinstance(layer, Equilibrium):
            return
        layer.stop = dataclasses.replace(layer.stop, max_evals=self.factor * layer.stop.max_evals)
        if layer.eval_stop is not None:
            layer.eval_stop = dataclasses.replace(layer.eval_stop, max_evals=self.factor * layer.eval_stop.max_evals)
        stop = getattr(layer.gradient, "stop", None)
        if stop is not None:
            stop = dataclasses.replace(stop, max_evals=self.factor * stop.max_evals)
            layer.gradient = dataclasses.replace(layer.gradient, stop=stop)  # pyright: ignore
