"""The exact gradient by the implicit function theorem.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u``.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from equilibria.core.failure import report
from equilibria.core.gradient import ForwardSolve, GradientRule, solve_without_graph
from equilibria.core.maps import Map
from equilibria.core.solve import Solution, Solver
from equilibria.core.state import State
from equilibria.core.stop import Stop
from equilibria.gradients.linearise import Point, as_state, attached, check_arrival, solve_adjoint
from equilibria.solvers.anderson import Anderson


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
    """For the adjoint system; its budget counts VJPs, its tolerances are in units of ‖g‖."""

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution, with f(z*) as its differentiable z."""
        solution = solve_without_graph(f, z0, method)
        solved = solution.adjoint  # nothing else of the solution is kept until the backward pass

        def adjoint(point: Point, g: Tensor) -> Tensor:
            found = solve_adjoint(point, g, self.solver, self.stop)
            solved.append(as_state(point, found))
            of = "The adjoint solve of Implicit()"
            report(found, self.stop, method.on_failure, of=of)
            check_arrival(point, g, found, self.stop, method.on_failure, of=of)
            return found.z

        return attached(f, solution, adjoint, method)

    def with_budget(self, factor: int) -> Implicit:
        """The rule with ``factor`` times the budget of its adjoint solve."""
        stop = dataclasses.replace(self.stop, max_evals=factor * self.stop.max_evals)
        return dataclasses.replace(self, stop=stop)
