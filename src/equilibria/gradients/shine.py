"""SHINE: the forward solve's inverse, shared with the backward pass."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from equilibria.core.gradient import GradientRule
from equilibria.core.maps import Map
from equilibria.core.solve import Solution, solve_without_graph
from equilibria.core.solver import ForwardSolve
from equilibria.core.state import State
from equilibria.gradients.linearise import Point, attached
from equilibria.solvers.broyden import Broyden, BroydenHistory


@dataclasses.dataclass(frozen=True)
class Shine(GradientRule):
    """u = −Hᵀg with the H ≈ (J − I)⁻¹ that Broyden's method left behind: no VJP at all.

    Z. Ramzi et al., "SHINE: SHaring the INverse Estimate" (ICLR 2022). Approximate: H knows only the directions that
    the forward solve explored. Needs ``Broyden`` as forward solver, whose ``rank`` is raised to the budget: a restart
    would erase what H knows about samples that were done before it.
    """

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution, with f(z*) as its differentiable z."""
        solver, stop = method.solver, method.stop
        if not isinstance(solver, Broyden):
            raise TypeError(
                f"Shine() got the solver {solver}; it reads the inverse that Broyden builds: use solver=Broyden(), or "
                "another gradient rule such as Implicit()."
            )
        solver = dataclasses.replace(solver, rank=max(solver.rank, stop.max_evals))
        solution = solve_without_graph(f, z0, method, solver=solver, keep_history=True)
        history: BroydenHistory = solution.history

        def adjoint(point: Point, g: Tensor) -> Tensor:
            if point.copies is None:
                return history.apply_transposed(g)
            each = [history.apply_transposed(part) for part in g.unflatten(0, (point.copies, -1))]
            return torch.cat(each)

        return attached(f, dataclasses.replace(solution, history=None), adjoint, method)
