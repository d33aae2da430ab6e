"""Back-propagation through the solver's iterations."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equilibria.core.gradient import ForwardSolve, GradientRule
from equilibria.core.maps import Map
from equilibria.core.solve import Solution, solve
from equilibria.core.state import State
from equilibria.core.trees import map_tensors


@dataclasses.dataclass(frozen=True)
class Recomputed(Map):
    """f, evaluated again in the backward pass; products with J are differentiated as they are."""

    f: Map

    def __call__(self, z: State) -> State:
        """f(z), of which only z is kept."""
        return checkpoint(self.f, z, use_reentrant=False)

    def jvp(self, z: State, v: State) -> State:
        """J(z)·v."""
        return self.f.jvp(z, v)


@dataclasses.dataclass(frozen=True)
class Unroll(GradientRule):
    """The gradient of the iterate itself, by ordinary back-propagation through every step: memory grows with depth.

    With ``Picard()`` and ``Stop(rtol=0, atol=0, max_evals=L + 1, best=False)`` it is a weight-tied network of depth L.
    If ``Stop.best`` returns the start itself, that carries no gradient of f: ask for the last iterate.
    """

    checkpoint: bool = False
    """Keep only the iterates and evaluate f again in the backward pass (T. Chen et al. 2016)."""

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution as the solver returns it, with the graph of all its steps."""
        if self.checkpoint and torch.is_grad_enabled():
            f = Recomputed(f)
        solution = solve(f, z0, method.solver, method.stop, coupled=method.coupled, keep=method.keep)
        # What is kept for reports must not keep the graph alive.
        return dataclasses.replace(solution, fz=map_tensors(Tensor.detach, solution.fz), history=None)
