"""The exact gradient by the implicit function theorem.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u``.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from equilibria.equilibrium import GradientRule, without_graph
from equilibria.gradients.adjoint import Linearised, attached, solve_adjoint
from equilibria.solve import Map, Solution, Solver, Stop
from equilibria.solvers import Anderson


@dataclasses.dataclass(frozen=True)
class Implicit(GradientRule):
    """dL/dθ = uᵀ ∂f/∂θ with u = Jᵀu + g at z*: Bai, Kolter, Koltun (2019), theorem 1.

    The forward solve keeps no graph; one evaluation f(z*) with graph is all the memory. The adjoint system is solved
    for g/‖g‖ from u = g/‖g‖, so that tolerances are relative to ‖g‖ and neither cost nor accuracy depends on the scale
    of the loss. The error of the gradient is of the order of the two residuals, whether or not the solves converged.
    Each backward pass appends its solution to ``Solution.adjoint``. Double backward is an error.
    """

    solver: Solver = Anderson()
    """For the adjoint system."""
    stop: Stop = Stop()
    """For the adjoint system; its budget counts products with Jᵀ, its tolerances are in units of ‖g‖."""

    def run(self, f: Map, z0: Float[Tensor, "B *state"], solver: Solver, stop: Stop) -> Solution:
        """The solution, with f(z*) as its differentiable z."""
        solution = without_graph(f, z0, solver, stop)
        solved = solution.adjoint  # of the solution no more is held until the backward pass

        def adjoint(point: Linearised, g: Tensor) -> Tensor:
            solved.append(solve_adjoint(point, g, self.solver, self.stop))
            return solved[-1].z

        return attached(f, solution, adjoint)
