"""Back-propagation through the solver's iterations."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.diagnosis import Message
from equilibria.core.failure import tell
from equilibria.core.gradient import GradientRule
from equilibria.core.maps import Map, rounding_unit
from equilibria.core.rounding import FALLEN, LEVEL
from equilibria.core.solve import Solution, solve
from equilibria.core.solver import ForwardSolve
from equilibria.core.state import State
from equilibria.core.stop import is_heard
from equilibria.core.trees import map_tensors, tensors_in
from equilibria.gradients.repeats import Checkpoints
from equilibria.torch_private import is_batched, is_forward_mode, own_parametrizations


@dataclasses.dataclass(frozen=True)
class Recomputed(Map):
    """f with checkpoints: it is evaluated again in the backward pass. Products with J are not checkpointed."""

    f: Map
    checkpoints: Checkpoints

    def __call__(self, z: State) -> State:
        """f(z); only z is kept for the backward pass."""
        return self.checkpoints.call(self._value, z)

    def _value(self, z: State) -> State:
        with own_parametrizations():  # the second evaluation may run outside of ``cached()``
            return self.f(z)

    def jvp(self, z: State, v: State) -> State:
        """J(z)·v."""
        return self.f.jvp(z, v)


@dataclasses.dataclass(frozen=True)
class Unroll(GradientRule):
    """The gradient of the iterate itself, by ordinary back-propagation through every step: memory grows with depth.

    With ``Picard()`` and ``Stop(rtol=0, atol=0, max_evals=L + 1, best=False)`` it is a weight-tied network of depth L.
    The gradient converges as the residual falls from its first value: from a start near the solution, few steps meet
    the tolerance and the gradient has hardly begun to converge. A warning says so (see ``Method.on_failure``). A stop
    without tolerance takes all its steps: then the warning comes only from a start at the level of rounding, unless
    the solver is ``Picard`` or ``Reversible`` and the last iterate is returned (``best=False``). Steps of ``Anderson``
    and ``Broyden`` that no longer reduce a residual at the level of rounding keep the derivative of the best iterate.
    """

    checkpoint: bool = False
    """Keep only the iterates and evaluate f again in the backward pass (T. Chen et al. 2016)."""

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution as the solver returns it, with the graph of all its steps."""
        if is_batched():
            raise RuntimeError(
                "Unroll() cannot be used inside torch.func.vmap, where no loop can depend on a residual; use "
                "gradient=Implicit(), or give f a larger batch."
            )
        if self.checkpoint and torch.is_grad_enabled():
            # When the backward pass begins, ``functional_call`` has put the module's own weights back.
            f = Recomputed(f.bound(), Checkpoints(method.stop, method.on_failure, coupled=method.coupled))
        solution = solve(f, z0, method.solver, method.stop, coupled=method.coupled, keep=method.keep)
        if not any(leaf.numel() for leaf in tensors_in(z0)):  # no step is taken, and z0 itself may have no graph
            return dataclasses.replace(solution, z=solution.fz, history=None)
        derived = torch.is_grad_enabled() or is_forward_mode()
        if derived and is_heard(method.stop, method.on_failure):
            _check_steps(solution, method)
        elif derived and method.on_failure != "ignore" and (method.stop.best or not method.solver.plain):
            _check_start(solution, method)
        # Fields that serve reports only must not keep the graph alive.
        return dataclasses.replace(solution, fz=map_tensors(Tensor.detach, solution.fz), history=None)


UNCONVERGED = 1e-2
"""Relative error of a gradient, as estimated, above which a warning is given."""


def _check_steps(solution: Solution, method: ForwardSolve) -> None:
    """Report samples that met the tolerance before their gradient had converged.

    Derivatives with respect to the constants of f begin at zero and converge at the rate of the residual, so the last
    residual divided by the first is about the relative error of the gradient.
    """
    first, last = solution.trace[0].detach(), solution.residual.detach()
    error = torch.where(solution.steps > 0, last / first.where(first > 0, torch.ones_like(first)), 1.0)
    early = solution.converged & (error > max(UNCONVERGED, 10 * method.stop.rtol))
    tell(
        early,
        lambda: Message(
            f"Unroll(): {int(early.sum())} of {len(early)} samples met the tolerance near their start, and their "
            f"gradient is wrong by up to {float(error[early].max()):.0%}",
            "Start from zeros, take a fixed number of steps with Stop(rtol=0, max_evals=…, best=False), or use "
            "gradient=Implicit().",
            kind="Unroll()",
        ),
        method.on_failure,
    )


def _check_start(solution: Solution, method: ForwardSolve) -> None:
    """Report samples that a stop without tolerance began at the level of rounding.

    Their first iterate may be the best one, and the steps of most solvers from there are combinations of rounding
    errors. In both cases the derivative does not converge.
    """
    eps = rounding_unit(tensors_in(solution.z))
    near = solution.trace[0].detach() <= min(LEVEL / FALLEN * eps, 0.1)  # in half precision, zeros are no near start
    tell(
        near,
        lambda: Message(
            f"Unroll(): {int(near.sum())} of {len(near)} samples began at the level of rounding, where steps carry "
            "little or no derivative, and their gradient may be wrong",
            "Start from zeros, take the last iterate of Picard() with Stop(rtol=0, max_evals=…, best=False), or use "
            "gradient=Implicit().",
            kind="Unroll()",
        ),
        method.on_failure,
    )
