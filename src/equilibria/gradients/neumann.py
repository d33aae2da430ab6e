"""The truncated Neumann series of the implicit gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.gradient import GradientRule
from equilibria.core.maps import Map
from equilibria.core.solve import Solution, solve_without_graph
from equilibria.core.solver import ForwardSolve
from equilibria.core.state import State
from equilibria.core.stop import Stop
from equilibria.gradients.linearise import Point, as_state, attached, solve_linear
from equilibria.solvers.picard import Picard


@dataclasses.dataclass(frozen=True)
class Neumann(GradientRule):
    """u = λ Σ_{i ≤ k} (Bᵀ)ⁱ g with B = λJ + (1 − λ)I, where λ = 1 means B = J: k VJPs instead of a solve.

    k = 0 is the Jacobian-free gradient (S. Wu Fung et al., JFB, AAAI 2022), times λ; the error falls like ρ(B)^(k+1)
    and grows without bound where ρ(B) > 1. With λ < 1 it is the Neumann form of the phantom gradient (Z. Geng et al.,
    "On Training Implicit Models", NeurIPS 2021): at an exact fixed point that of ``Phantom(k + 1, λ)``, with the memory
    of one evaluation. Each backward pass with k > 0 appends its solution to ``Solution.adjoint``.
    """

    terms: int
    """k ≥ 0, the number of VJPs."""
    damping: float = 1.0
    """λ in (0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.terms < 0:
            raise ValueError(f"Neumann(terms={self.terms}): the number of VJPs is ≥ 0; try 5, or 0 for JFB.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"Neumann(damping={self.damping}): the damping lies in (0, 1]; try 1.0 or 0.5.")

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution, with f(z*) as its differentiable z."""
        solution = solve_without_graph(f, z0, method)
        solved = solution.adjoint  # only this list is kept until the backward pass, not the solution

        def adjoint(point: Point, g: Tensor) -> Tensor:
            g = g if self.damping == 1.0 else self.damping * g
            if self.terms == 0:
                return g
            budget = Stop(rtol=0, atol=0, max_evals=self.terms, best=False)
            found = solve_linear(self._damped(point.vjp), g, point.solved_layout, Picard(), budget)
            solved.append(as_state(point, found))
            return found.fz

        return attached(f, solution, adjoint, method)

    def _damped(self, vjp: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """v ↦ Bᵀv."""
        return vjp if self.damping == 1.0 else lambda v: v.lerp(vjp(v).to(v.dtype), self.damping)
