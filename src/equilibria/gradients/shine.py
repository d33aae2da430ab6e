"""SHINE: the forward solve's inverse, shared with the backward pass."""

from __future__ import annotations

import dataclasses

from jaxtyping import Float
from torch import Tensor

from equilibria.equilibrium import GradientRule, without_graph
from equilibria.gradients.adjoint import Linearised, attached
from equilibria.solve import Map, Solution, Solver, Stop, algebra_dtype
from equilibria.solvers.broyden import Broyden, BroydenHistory


@dataclasses.dataclass(frozen=True)
class Shine(GradientRule):
    """u = −Hᵀg with the H ≈ (J − I)⁻¹ that Broyden's method left behind: no product with Jᵀ at all.

    Z. Ramzi et al., "SHINE: SHaring the INverse Estimate" (ICLR 2022). Approximate: H knows the directions that the
    forward solve explored. Needs ``Broyden`` as forward solver, whose ``memory`` is raised to the budget: after a
    restart H would have forgotten the samples that were done before.
    """

    def run(self, f: Map, z0: Float[Tensor, "B *state"], solver: Solver, stop: Stop) -> Solution:
        """The solution, with f(z*) as its differentiable z."""
        if not isinstance(solver, Broyden):
            raise TypeError(
                f"Shine() got the solver {solver}; it reads the inverse that Broyden builds: use solver=Broyden(), or "
                "another gradient rule such as Implicit()."
            )
        solver = dataclasses.replace(solver, memory=max(solver.memory, stop.max_evals))
        solution = without_graph(f, z0, solver, stop, keep_history=True)
        history: BroydenHistory = solution.history

        def adjoint(point: Linearised, g: Tensor) -> Tensor:
            flat = g.reshape(len(g), -1).to(algebra_dtype(g.dtype))
            return history.apply_transposed(flat).view_as(g).to(g.dtype)

        return attached(f, dataclasses.replace(solution, history=None), adjoint)
