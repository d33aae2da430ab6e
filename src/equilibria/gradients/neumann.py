"""The truncated Neumann series of the implicit gradient."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.gradient import ForwardSolve, GradientRule, solve_without_graph
from equilibria.core.maps import Map
from equilibria.core.solve import Solution
from equilibria.core.state import State
from equilibria.core.stop import Stop
from equilibria.gradients.linearise import Point, as_state, attached, solve_adjoint
from equilibria.solvers.picard import Picard


@dataclasses.dataclass(frozen=True)
class Neumann(GradientRule):
    """u = Σ_{i ≤ k} (Jᵀ)ⁱ g: k VJPs instead of a solve.

    k = 0 is the Jacobian-free gradient (S. Wu Fung et al., JFB, AAAI 2022); the error falls like ρ(J)^(k+1) and grows
    without bound where ρ(J) > 1. Each backward pass appends its solution to ``Solution.adjoint``.
    """

    terms: int
    """k ≥ 0, the number of VJPs."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.terms < 0:
            raise ValueError(f"Neumann(terms={self.terms}): the number of VJPs is ≥ 0; try 5, or 0 for JFB.")

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution, with f(z*) as its differentiable z."""
        solution = solve_without_graph(f, z0, method)
        solved = solution.adjoint  # only this list is kept until the backward pass, not the solution

        def adjoint(point: Point, g: Tensor) -> Tensor:
            if self.terms == 0:
                return g
            budget = Stop(rtol=0, atol=0, max_evals=self.terms, best=False)
            found = solve_adjoint(point, g, Picard(), budget)
            solved.append(as_state(point, found))
            return found.fz

        return attached(f, solution, adjoint, method)
