"""fixed_point: the equilibrium of any function, with its gradient, in one call; Method: how a fixed point is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from equilibria.core.checks import check_kind
from equilibria.core.gradient import GradientRule
from equilibria.core.maps import FunctionMap, Map, as_map
from equilibria.core.solve import Solution, Solver
from equilibria.core.state import State
from equilibria.core.stop import Stop
from equilibria.gradients.implicit import Implicit
from equilibria.solvers.anderson import Anderson


@dataclasses.dataclass(frozen=True)
class Method:
    """How a fixed point is found and differentiated: one frozen value, passed along with a call."""

    solver: Solver = Anderson()
    """Proposes the iterates of the forward solve."""
    stop: Stop = Stop()
    """Tolerances and budget of the forward solve."""
    gradient: GradientRule = Implicit()
    """How the gradient gets through the solve."""

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "Anderson()")
        check_kind("stop", self.stop, Stop, "Stop(rtol=1e-3)")
        check_kind("gradient", self.gradient, GradientRule, "Implicit()")

    def run(self, f: Map, z0: State) -> Solution:
        """The solution of z = f(z) from z0; its ``z`` carries the gradient."""
        return self.gradient.run(f, z0, self)

    def with_budget(self, factor: int) -> Method:
        """The method with ``factor`` times the budget, forward and backward."""
        stop = dataclasses.replace(self.stop, max_evals=factor * self.stop.max_evals)
        return dataclasses.replace(self, stop=stop, gradient=self.gradient.with_budget(factor))


def fixed_point(
    f: Map | Callable[..., State],
    z0: State,
    *operands: Any,
    solver: Solver = Method.solver,
    stop: Stop = Method.stop,
    gradient: GradientRule = Method.gradient,
) -> Solution:
    """The solution of z = f(z, *operands) for each sample; its ``z`` carries the gradient to everything that f uses.

    Args:
        f: any function of a state that returns a state built like it, treats samples independently and gives the same
            bits when called twice (no fresh dropout masks inside). Parameters and inputs that it closes over receive
            gradients, and so do operands.
        z0: the start, usually zeros: a tensor ``[B *shape]``, or a dict, tuple or list of such tensors.
        operands: further arguments of f, constant during the solve.
        solver: how iterates are proposed.
        stop: tolerances and the budget in evaluations of f.
        gradient: how the gradient gets through the solve.

    Raises:
        ValueError, TypeError: z0 has no batch axis, is empty or not finite; f changes structure, shape, dtype or
            device.
    """
    method = Method(solver=solver, stop=stop, gradient=gradient)
    return method.run(_with_operands(as_map(f), operands), z0)


def _with_operands(f: Map, operands: tuple[Any, ...]) -> Map:
    if not operands:
        return f
    if not isinstance(f, FunctionMap):
        raise TypeError(f"a {type(f).__name__} is a map of the state alone and takes no operands; give a function.")
    function: Callable[..., State] = f.function
    return FunctionMap(lambda z: function(z, *operands))
