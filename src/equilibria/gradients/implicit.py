"""Implicit differentiation: exact derivatives of every order by the implicit function theorem.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u``; tangents ``w`` of z*, ``h`` of f(z*).
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.checks import check_kind
from equilibria.core.diagnosis import ADJOINT, TANGENT
from equilibria.core.failure import report
from equilibria.core.gradient import GradientRule
from equilibria.core.maps import Map, rounding_unit
from equilibria.core.solve import Solution, solve_without_graph
from equilibria.core.solver import ForwardSolve, Solver
from equilibria.core.state import Layout, State
from equilibria.core.stop import Stop, is_heard
from equilibria.core.trees import tensors_in
from equilibria.gradients.functional import solved
from equilibria.gradients.higher import AdjointMap, RowsMethod, TangentMap, deliver, through
from equilibria.gradients.linearise import (
    Edge,
    OnStates,
    Orders,
    Point,
    as_state,
    attached,
    needs_leaves,
    solve_adjoint,
    solve_linear,
    split_dual,
)
from equilibria.gradients.repeats import check_arrival, check_unchanged
from equilibria.solvers.anderson import Anderson
from equilibria.torch_private import is_of_older_vmap, is_transformed, without_forward_mode


@dataclasses.dataclass(frozen=True)
class Implicit(GradientRule):
    """dL/dθ = uᵀ ∂f/∂θ with u = Jᵀu + g at z*: Bai, Kolter, Koltun (2019), theorem 1.

    The forward solve keeps no graph; it stores one evaluation f(z*) with graph and the tensors that f reads. The
    adjoint system is solved for g/‖g‖ from u = g/‖g‖, so that neither cost nor accuracy depends on the scale of the
    loss. The error of the gradient is of the order of the two residuals, whether or not the solves converged. Each
    backward pass appends its solution to ``Solution.adjoint``.

    Derivatives of every order exist. Under ``create_graph=True`` u is the fixed point of u ↦ Jᵀu + g, differentiated by
    this same rule; in forward mode the tangent of z* is the fixed point of w ↦ Jw + h. Each order costs one more solve
    and no memory that grows with its steps.
    """

    solver: Solver = Anderson()
    """Solves the adjoint system."""
    stop: Stop = Stop()
    """When the adjoint system is solved: ‖Jᵀu + g − u‖ ≤ rtol·‖Jᵀu + g‖ + atol·‖g‖; its budget is in VJPs."""

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "Anderson()")
        check_kind("stop", self.stop, Stop, "Stop(rtol=1e-3)")

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution, with f(z*) as its differentiable z."""
        if is_transformed():
            return solved(f, z0, method, solver=self.solver, stop=self.stop)
        return _attached(self, f, solve_without_graph(f, z0, method, forward_mode=True), method)

    def with_budget(self, factor: int) -> Implicit:
        """The rule with ``factor`` times the budget of its adjoint solve."""
        stop = dataclasses.replace(self.stop, max_evals=factor * self.stop.max_evals)
        return dataclasses.replace(self, stop=stop)


def _attached(rule: Implicit, f: Map, solution: Solution, method: ForwardSolve, *, checked: bool = True) -> Solution:
    """``solution``, which has no graph, with a z that can be differentiated to any order."""
    # Only the list of adjoint solutions is kept until the backward pass, not the solution.
    heard = checked and is_heard(method.stop, method.on_failure)
    systems = _Systems(rule, method, solution.adjoint, solution.residual if heard else None)
    return attached(f, solution, systems.adjoint, method, systems, checked=checked)


_MANY_TANGENTS = (
    "torch.autograd.functional.jacobian(vectorize=True, strategy='forward-mode') gives a solve all tangents at once, "
    "and it cannot take them; use torch.func.jacfwd, or strategy='reverse-mode'."
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Systems(Orders):
    """The linear systems of one fixed point."""

    rule: Implicit
    method: ForwardSolve
    solved: list[Solution]
    residual: Float[Tensor, " B"] | None
    """The relative residual of z*; None if no change of f is reported."""

    def adjoint(self, point: Point, g: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """u = Jᵀu + g without graph."""
        return self._solve_adjoint(point, g).z

    def again(self, point: Point, z: Float[Tensor, "B N"], g: Float[Tensor, "B N"], below: Edge) -> Tensor:
        """u = Jᵀu + g with graph and tangent, as a fixed point that this rule differentiates."""
        with torch.no_grad(), without_forward_mode():
            found = self._solve_adjoint(point, g)
        there = through(point.f, z, point.tangent, point.layout, point.linearised)
        u = self._differentiable(AdjointMap(there, point.layout, g), found, point.layout)
        delivered = deliver(there, point.layout, u, below, alike=point.alike)
        if self.residual is not None:
            check_unchanged(there, z, self.residual, self.method, point.layout)
        return delivered

    def tangent(self, point: Point, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """w = Jw + h, with graph."""
        rule, layout = self.rule, point.layout
        there = through(point.f, z, (), layout, point.linearised)
        _, h = split_dual(there.value, layout)
        assert h is not None  # called only if f(z*) has a tangent
        if is_of_older_vmap(h):
            raise RuntimeError(_MANY_TANGENTS)
        with without_forward_mode(), point.linearised.autocast.off():
            system = TangentMap(there, layout, h)
            with torch.no_grad():
                found = solve_linear(system.linear, h, layout, rule.solver, rule.stop)
            if is_heard(rule.stop, self.method.on_failure):
                eps = rounding_unit(tensors_in(there.value), point.linearised.autocast)
                report(found, rule.stop, self.method.on_failure, of=TANGENT, eps=eps)
            return self._differentiable(system, found, layout)

    def _solve_adjoint(self, point: Point, g: Float[Tensor, "B N"]) -> Solution:
        rule = self.rule
        found = solve_adjoint(point, g, rule.solver, rule.stop)
        self.solved.append(as_state(point, found))
        if is_heard(rule.stop, self.method.on_failure):
            self._report(point, g, found)
        return found

    def _report(self, point: Point, g: Float[Tensor, "B N"], found: Solution) -> None:
        said = {"stop": self.rule.stop, "on_failure": self.method.on_failure, "of": ADJOINT}
        report(found, **said, eps=rounding_unit(tensors_in(point.linearised.value), point.linearised.autocast))
        if point.copies is None:
            check_arrival(point.linearised, g, found, point.layout, **said)

    def _differentiable(self, system: Map, found: Solution, layout: Layout) -> Float[Tensor, "B N"]:
        """The solution of a linear system of rows, differentiable by this same rule.

        J is taken at f(z*) here, and at z* in the solve. So the value differs by about the error of the forward solve,
        which has been reported already, and is not checked.
        """
        rule = self.rule
        method = RowsMethod(solver=rule.solver, stop=rule.stop, on_failure=self.method.on_failure)
        if not needs_leaves(rule.stop):
            return _attached(rule, system, found, method, checked=False).z
        wide = layout.widened()
        states = dataclasses.replace(found, z=wide.unpack(found.z), fz=wide.unpack(found.fz))
        method = dataclasses.replace(method, coupled=wide.coupled)
        return wide.pack(_attached(rule, OnStates(system, wide), states, method, checked=False).z)
