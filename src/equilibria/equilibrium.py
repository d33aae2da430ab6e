"""Equilibrium: a cell, a solver, a stopping rule and a gradient rule make a layer.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equilibria.explicit import Stack, Unrolled
from equilibria.layer import Cell, CellMap, Context, LayerOutput, Memory
from equilibria.solve import (
    Map,
    Solution,
    Solver,
    Stop,
    check_kind,
    solve,
)

__all__ = [
    "Cell",
    "Context",
    "Equilibrium",
    "GradientRule",
    "LayerOutput",
    "Memory",
    "Stack",
    "Unrolled",
    "check_parts",
    "without_graph",
]


class GradientRule(ABC):
    """Owns the solve and decides how the gradient gets through it. Subclasses are frozen dataclasses."""

    @abstractmethod
    def run(self, f: Map, z0: Float[Tensor, "B *state"], solver: Solver, stop: Stop) -> Solution:
        """The solution of z = f(z) from z0; its ``z`` carries the gradient."""


class Equilibrium(nn.Module):
    """z* = f(z*; x): the fixed point of one weight-tied cell (Bai, Kolter, Koltun 2019, eq. 3).

    Args:
        cell: the map f.
        solver: proposes iterates.
        stop: tolerances and budget of the forward solve.
        gradient: how the gradient gets through the solve.
        eval_stop: tolerances and budget in ``eval()`` mode; ``stop`` if None.
        warm: start from what the cell remembers of the segment before (``Cell.warm_start``), instead of its ``start``.
    """

    def __init__(
        self,
        cell: Cell,
        solver: Solver,
        stop: Stop,
        gradient: GradientRule,
        eval_stop: Stop | None = None,
        *,
        warm: bool = False,
    ) -> None:
        super().__init__()
        check_kind("cell", cell, Cell, "TransformerCell(TransformerShape()), or a Cell of your own")
        check_parts(solver, stop, gradient)
        self.cell, self.solver, self.stop, self.gradient, self.eval_stop = cell, solver, stop, gradient, eval_stop
        self.warm = warm

    def forward(self, x: Float[Tensor, "B T D"], memory: Memory = None, *, start: Tensor | None = None) -> LayerOutput:
        """The equilibrium under input ``x [B T D]`` and the memory of the previous segment.

        Args:
            x: the input.
            memory: as the previous segment's output has it.
            start: the first iterate, such as the equilibrium of a similar input; it decides on the cost alone, as long
                as there is one equilibrium. None for the cell's own.

        Raises:
            ValueError: ``start`` has another shape than the state, or is not finite.
        """
        context = self.cell.prepare(x, memory)
        f = CellMap(self.cell, context, several=x.shape[1] > 1)
        stop = self.stop if self.training else self.evaluation_stop
        solution = self.gradient.run(f, self._first(context, start), self.solver, stop)
        return LayerOutput(
            z=solution.z,
            memory=self.cell.remember(solution.z, context),
            f=f.eager(),
            solution=solution,
            output=self.cell.output(solution.z),
        )

    def _first(self, context: Context, start: Tensor | None) -> Tensor:
        own = self.cell.warm_start(context) if self.warm else self.cell.start(context)
        if start is None:
            return own
        if start.shape != own.shape:
            raise ValueError(
                f"start has the shape {tuple(start.shape)} and the state {tuple(own.shape)}; give a state of this "
                "input's batch and length, for example the z of an earlier output, or None."
            )
        return start.to(own)

    @property
    def evaluation_stop(self) -> Stop:
        """The stop that holds in ``eval()`` mode."""
        return self.eval_stop or self.stop

    def cache(self, batch: int, **choices: Any) -> Memory:
        """A memory for generation; see ``Cell.cache``."""
        return self.cell.cache(batch, **choices)

    def extra_repr(self) -> str:
        """Solver, stopping rule and gradient rule."""
        parts = f"solver={self.solver}, stop={self.stop}, gradient={self.gradient}, eval_stop={self.eval_stop}"
        return f"{parts}, warm={self.warm}"


def check_parts(solver: Solver, stop: Stop, gradient: GradientRule) -> None:
    """Refuses, by name, what is no solver, stopping rule or gradient rule."""
    check_kind("solver", solver, Solver, "Anderson()")
    check_kind("stop", stop, Stop, "Stop(rtol=1e-3)")
    check_kind("gradient", gradient, GradientRule, "Implicit()")


def without_graph(f: Map, z0: Tensor, solver: Solver, stop: Stop, *, keep_history: bool = False) -> Solution:
    """``solve`` with gradients off: the first half of every rule that does not unroll."""
    # A history is of all samples only if all of them are evaluated to the end.
    whole: Map = (lambda z: f(z)) if keep_history else f
    with torch.no_grad():
        solution = solve(whole, z0.detach(), solver, stop)
    if not keep_history:  # many states; the backward pass needs the room
        solution = dataclasses.replace(solution, history=None)
    # Autocast caches weights that were cast without a graph; the graph-carrying evaluation must not meet them.
    torch.clear_autocast_cache()
    return solution
