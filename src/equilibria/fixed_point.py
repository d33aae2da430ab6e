"""fixed_point: an equilibrium of any closure, with a gradient, in one call."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from equilibria.equilibrium import GradientRule, check_parts
from equilibria.gradients import Implicit
from equilibria.solve import Map, Solution, Solver, Stop, check_kind
from equilibria.solvers import Anderson


def fixed_point(
    f: Map,
    z0: Float[Tensor, "B *state"],
    *,
    solver: Solver = Anderson(),
    stop: Stop = Stop(),
    gradient: GradientRule = Implicit(),
) -> Solution:
    """The solution of z = f(z) for each sample; its ``z`` carries the gradient to everything that f uses.

    Args:
        f: any function ``[B *state] -> [B *state]`` that treats samples independently and gives the same bits when
            called twice (no fresh dropout masks inside); parameters and inputs that it closes over receive gradients.
        z0: the start, usually zeros, with the batch as first axis.
        solver: how iterates are proposed.
        stop: tolerances and the budget in evaluations of f.
        gradient: how the gradient gets through the solve.

    Raises:
        ValueError, TypeError: z0 has no batch axis, is empty or not finite; f changes shape, dtype or device.
    """
    check_kind("z0", z0, Tensor, "torch.zeros(batch, width); f comes first, then z0")
    check_parts(solver, stop, gradient)
    return gradient.run(f, z0, solver, stop)
