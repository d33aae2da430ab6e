"""GradientRule: runs the solve, and decides how the gradient gets through it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from torch.autograd import forward_ad

from equilibria.checks import check_kind
from equilibria.core.graph import kept, without_graph
from equilibria.core.maps import Map
from equilibria.core.solve import Solution, solve_from
from equilibria.core.solver import Solver
from equilibria.core.state import State
from equilibria.core.stop import OnFailure, Stop
from equilibria.core.trees import map_tensors, tensors_in
from equilibria.torch_private import is_forward_mode, is_transformed, without_forward_mode


@runtime_checkable
class ForwardSolve(Protocol):
    """The fields of a ``Method`` that a rule reads: settings of the forward solve, and the reaction to a failure."""

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
        """True if f mixes the samples, so that the whole state is one problem."""
        ...

    @property
    def on_failure(self) -> OnFailure:
        """The reaction to a forward or backward solve that does not converge."""
        ...

    @property
    def keep(self) -> tuple[int, ...]:
        """Numbers of steps after which the solve stores its state in ``Solution.iterates``."""
        ...

    @property
    def keep_point(self) -> bool:
        """True if ``Solution.point`` is kept."""
        ...


class GradientRule(ABC):
    """Runs the solve and decides how the gradient gets through it. Subclasses are frozen dataclasses."""

    @abstractmethod
    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution of z = f(z) from z0; its ``z`` carries the gradient."""

    def with_budget(self, factor: int) -> GradientRule:
        """The rule with ``factor`` times its own budget of VJPs; by default the rule itself, which has no budget."""
        return self


def solve_without_graph(
    f: Map,
    z0: State,
    method: ForwardSolve,
    *,
    solver: Solver | None = None,
    stop: Stop | None = None,
    keep_history: bool = False,
    forward_mode: bool = False,
) -> Solution:
    """``solve`` with gradients off: the first half of every rule that does not unroll.

    Args:
        f: the map.
        z0: the start.
        method: settings of the solve.
        solver: replaces the method's solver.
        stop: replaces the method's stop.
        keep_history: keep all samples in the batch to the end, and return the solver's history of them.
        forward_mode: True if the rule handles tangents that f reads; otherwise they raise a RuntimeError.
    """
    if solver is not None:
        check_kind("solver", solver, Solver, "Anderson()")
    if stop is not None:
        check_kind("stop", stop, Stop, "Stop(rtol=1e-3)")
    _check_no_transform()
    if not forward_mode:
        _check_no_tangent(f, z0)
    with without_graph(), without_forward_mode(), kept():
        solution = solve_from(
            [map_tensors(torch.Tensor.detach, z0)],
            f,
            method.solver if solver is None else solver,
            method.stop if stop is None else stop,
            coupled=method.coupled,
            keep=method.keep,
            drop_converged=not keep_history,
        )
    if not keep_history and solution.history is not None:  # many states, and the backward pass needs the memory
        solution = dataclasses.replace(solution, history=None)
    return solution


def point_of(solution: Solution, method: ForwardSolve) -> State | None:
    """The ``Solution.point`` of a rule that replaces z: the z of the solve if the method keeps it, else None."""
    return solution.z if method.keep_point else None


_UNSUPPORTED = (
    "This gradient rule cannot be differentiated in forward mode or transformed by torch.func: the result would be "
    "wrong. Use gradient=Implicit(), or autograd (loss.backward(), torch.autograd.grad)."
)


def _check_no_transform() -> None:
    """Raise a RuntimeError inside torch.func.grad, vjp, jvp, vmap and their compositions."""
    if is_transformed():
        raise RuntimeError(_UNSUPPORTED)


def _check_no_tangent(f: Map, z0: State) -> None:
    """Raise a RuntimeError if f reads a dual tensor; inside a ``dual_level`` the check costs one evaluation of f."""
    if not is_forward_mode():
        return
    with without_graph():
        values = tensors_in(f(map_tensors(lambda leaf: forward_ad.unpack_dual(leaf).primal, z0)))
    if any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in values):
        raise RuntimeError(_UNSUPPORTED)
