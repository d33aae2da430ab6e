"""GradientRule: owns the solve, and decides how the gradient gets through it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch

from equilibria.core.failure import OnFailure
from equilibria.core.maps import Map
from equilibria.core.solve import Solution, Solver, solve
from equilibria.core.state import State
from equilibria.core.stop import Stop
from equilibria.core.trees import map_tensors


@runtime_checkable
class ForwardSolve(Protocol):
    """What a rule reads of a ``Method``: how the forward solve is done, and what to do when one fails."""

    @property
    def solver(self) -> Solver:
        """Proposes the iterates."""
        ...

    @property
    def stop(self) -> Stop:
        """Tolerances and budget."""
        ...

    @property
    def coupled(self) -> bool:
        """True if f mixes the samples: then the whole state is one problem."""
        ...

    @property
    def on_failure(self) -> OnFailure:
        """What happens when a solve, forward or backward, does not converge."""
        ...

    @property
    def keep(self) -> tuple[int, ...]:
        """Numbers of steps after which the state is kept in ``Solution.iterates``."""
        ...


class GradientRule(ABC):
    """Owns the solve and decides how the gradient gets through it. Subclasses are frozen dataclasses."""

    @abstractmethod
    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution of z = f(z) from z0; its ``z`` carries the gradient."""

    def with_budget(self, factor: int) -> GradientRule:
        """The rule with ``factor`` times its own budget of VJPs; here the rule itself, which has none."""
        return self


def solve_without_graph(
    f: Map,
    z0: State,
    method: ForwardSolve,
    *,
    solver: Solver | None = None,
    stop: Stop | None = None,
    keep_history: bool = False,
) -> Solution:
    """``solve`` with gradients off: the first half of every rule that does not unroll.

    Args:
        f: the map.
        z0: the start.
        method: how to solve.
        solver: in place of the method's.
        stop: in place of the method's.
        keep_history: evaluate all samples to the end and keep the solver's history of them.
    """
    with torch.no_grad():
        solution = solve(
            f,
            map_tensors(torch.Tensor.detach, z0),
            solver or method.solver,
            stop or method.stop,
            coupled=method.coupled,
            keep=method.keep,
            drop_converged=not keep_history,
        )
    if not keep_history:  # many states; the backward pass needs the room
        solution = dataclasses.replace(solution, history=None)
    # Autocast caches weights that were cast without a graph; the graph-carrying evaluation must not meet them.
    torch.clear_autocast_cache()
    return solution
