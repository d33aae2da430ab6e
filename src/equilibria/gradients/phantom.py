"""The phantom gradient: a few tracked steps after an untracked solve."""

from __future__ import annotations

import dataclasses

import torch

from equilibria.checks import check_fields
from equilibria.core.gradient import GradientRule
from equilibria.core.maps import Map
from equilibria.core.solve import Solution, solve, solve_without_graph
from equilibria.core.solver import ForwardSolve
from equilibria.core.state import State
from equilibria.core.stop import is_heard
from equilibria.core.trees import map_pairs
from equilibria.gradients.repeats import check_again
from equilibria.solvers.picard import Picard


@dataclasses.dataclass(frozen=True)
class Phantom(GradientRule):
    """z_{t+1} = (1 − λ)·z_t + λ·f(z_t), k steps from the detached z*, with back-propagation through them.

    Z. Geng et al., "On Training Implicit Models" (NeurIPS 2021), the unrolled form. k = 1, λ = 1 is the Jacobian-free
    gradient (JFB). With λ < 1 and small k the gradient is scaled down (k = 1: by λ). Memory is k evaluations of f.
    Where gradients are off, the k steps are skipped and z is f(z*).
    """

    steps: int = 1
    """k ≥ 1, the number of tracked steps."""
    damping: float = 1.0
    """λ in (0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps < 1:
            raise ValueError(f"Phantom(steps={self.steps}): at least 1 tracked step carries the gradient; try 1 or 5.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"Phantom(damping={self.damping}): the damping lies in (0, 1]; try 1.0 or 0.5.")

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution, with the last tracked iterate as its differentiable z."""
        solution = solve_without_graph(f, z0, method)
        if not torch.is_grad_enabled():
            return dataclasses.replace(solution, z=solution.fz)
        # The norm stays that of the solve, whose residuals are compared with these.
        budget = dataclasses.replace(method.stop, rtol=0, atol=0, max_evals=self.steps, best=False)
        tracked = solve(f, solution.z, Picard(self.damping), budget, coupled=method.coupled)
        if is_heard(method.stop, method.on_failure):
            check_again(method, (tracked.trace[0].detach() - solution.residual).abs(), solution.z)
        z = map_pairs(lambda x, fx: x.lerp(fx, self.damping), tracked.z, tracked.fz)
        return dataclasses.replace(solution, z=z, evals=solution.evals + tracked.evals)
