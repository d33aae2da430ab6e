"""GradientRule: runs the solve, and decides how the gradient gets through it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from equilibria.core.maps import Map
from equilibria.core.solve import Solution
from equilibria.core.solver import ForwardSolve
from equilibria.core.state import State


class GradientRule(ABC):
    """Runs the solve and decides how the gradient gets through it. Subclasses are frozen dataclasses."""

    @abstractmethod
    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution of z = f(z) from z0; its ``z`` carries the gradient."""

    def with_budget(self, factor: int) -> GradientRule:
        """The rule with ``factor`` times its own budget of VJPs; by default the rule itself, which has no budget."""
        return self
