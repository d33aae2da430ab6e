"""The truncated Neumann series of the implicit gradient."""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from equilibria.equilibrium import GradientRule, without_graph
from equilibria.gradients.adjoint import Linearised, attached, solve_adjoint
from equilibria.solve import Map, Solution, Solver, Stop
from equilibria.solvers import Picard


@dataclasses.dataclass(frozen=True)
class Neumann(GradientRule):
    """u = Σ_{i ≤ k} (Jᵀ)ⁱ g: k products with Jᵀ instead of a solve.

    k = 0 is the Jacobian-free gradient (S. Wu Fung et al., JFB, AAAI 2022); the error falls like ρ(J)^(k+1) and grows
    without bound where ρ(J) > 1. Each backward pass appends its solution to ``Solution.adjoint``.
    """

    terms: int
    """k ≥ 0: products with Jᵀ."""

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise ValueError(f"Neumann(terms={self.terms}): the number of products is ≥ 0; try 5, or 0 for JFB.")

    def run(self, f: Map, z0: Float[Tensor, "B *state"], solver: Solver, stop: Stop) -> Solution:
        """The solution, with f(z*) as its differentiable z."""
        solution = without_graph(f, z0, solver, stop)
        solved = solution.adjoint  # of the solution no more is held until the backward pass

        def adjoint(point: Linearised, g: Tensor) -> Tensor:
            if self.terms == 0:
                return g
            budget = Stop(rtol=0, atol=0, max_evals=self.terms, best=False)
            solved.append(solve_adjoint(point, g, Picard(), budget))
            return solved[-1].fz

        return attached(f, solution, adjoint)
