"""Equilibrium: a cell, a solver, a stopping rule and a gradient rule make a layer; Unrolled, Stack: explicit networks.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from equilibria.layer import Cell, Context, LayerOutput, Memory
from equilibria.solve import (
    CompilableMap,
    Map,
    SelectableMap,
    Solution,
    Solver,
    Stop,
    check_kind,
    map_tensors,
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


@dataclasses.dataclass(frozen=True, eq=False)
class CellMap(SelectableMap, CompilableMap):
    """f(·; x) of a cell."""

    cell: Cell
    context: Context
    several: bool = False
    """Whether there are several positions, so that samples are worth being left out."""
    parameters: dict[str, Tensor] | None = None
    """In the place of the cell's own; None for these."""

    def __call__(self, z: Tensor) -> Tensor:
        """f(z)."""
        if self.parameters is None:
            return self.cell(z, self.context)
        return torch.func.functional_call(self.cell, self.parameters, (z, self.context))

    @property
    def selectable(self) -> bool:
        """Whether the cell knows how."""
        return self.several and type(self.cell).select is not Cell.select

    def select(self, rows: Int[Tensor, " R"]) -> CellMap:
        """With the context of these samples."""
        return dataclasses.replace(self, context=self.cell.select(self.context, rows))

    def eager(self) -> Map:
        """Past the compiled call."""
        return (lambda z: self.cell.forward(z, self.context)) if self._compiled else self

    def of_z_alone(self) -> Map | None:
        """With constants for parameters and context; None also on a GPU, where it was never tried."""
        parameters = {name: parameter.detach() for name, parameter in self.cell.named_parameters()}
        if not self._compiled or any(parameter.is_cuda for parameter in parameters.values()):
            return None
        return CellMap(self.cell, map_tensors(Tensor.detach, self.context), parameters=parameters)

    @property
    def _compiled(self) -> bool:
        return self.cell._compiled_call_impl is not None


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


class Unrolled(nn.Module):
    """The explicit, weight-tied network of depth L: z_l = f(z_{l−1}; x), z_0 = start, with back-propagation.

    All layers read one memory, that of the last state, so that for L → ∞ it is the equilibrium. Two segments joined by
    it are therefore not quite one long one, as they are for ``Stack``.

    Args:
        cell: the map f.
        depth: L, evaluations of f.
        checkpoint: keep only the states and evaluate f again in the backward pass (T. Chen et al. 2016).
        auxiliary_every: in training, give the outputs of layers k, 2k, … ≤ L too, for auxiliary losses; 0 for none.
    """

    def __init__(self, cell: Cell, depth: int, *, checkpoint: bool = False, auxiliary_every: int = 0) -> None:
        super().__init__()
        check_kind("cell", cell, Cell, "TransformerCell(TransformerShape()), or a Cell of your own")
        if depth < 1:
            raise ValueError(f"Unrolled(depth={depth}): a network has at least one layer; try depth=12.")
        if not 0 <= auxiliary_every <= depth:
            raise ValueError(
                f"Unrolled(depth={depth}, auxiliary_every={auxiliary_every}): one of the {depth} layers at least has "
                "an auxiliary output, or none with 0; try a fifth of the depth."
            )
        self.cell, self.depth, self.checkpoint, self.auxiliary_every = cell, depth, checkpoint, auxiliary_every

    def forward(self, x: Float[Tensor, "B T D"], memory: Memory = None) -> LayerOutput:
        """The last state under input ``x [B T D]`` and the memory of the previous segment."""
        context = self.cell.prepare(x, memory)
        z, auxiliary = self.cell.start(context), []
        for layer in range(1, self.depth + 1):
            z = _layer(self.cell, z, context, checkpoint=self.checkpoint)
            if self.training and self.auxiliary_every and layer % self.auxiliary_every == 0:
                auxiliary.append(self.cell.output(z))
        return LayerOutput(
            z=z,
            memory=self.cell.remember(z, context),
            f=lambda z: self.cell(z, context),
            solution=None,
            output=self.cell.output(z),
            auxiliary=tuple(auxiliary),
        )

    def cache(self, batch: int, **choices: Any) -> Memory:
        """A memory for generation; see ``Cell.cache``."""
        choices["warm"] = False  # a network of fixed depth begins where it was trained to begin
        return self.cell.cache(batch, **choices)

    def extra_repr(self) -> str:
        """Depth."""
        return f"depth={self.depth}, checkpoint={self.checkpoint}, auxiliary_every={self.auxiliary_every}"


class Stack(nn.Module):
    """The explicit network of L cells, each applied once, each with a memory of its own: z_l = f_l(z_{l−1}; x).

    A layer remembers its input z_{l−1}, whose keys and values are those it sees (Dai et al. 2019, eq. 3), so that two
    segments joined by memory are one long one. x enters every cell through its ``prepare``, and z_0 is the start of the
    first. A cell may occur several times: then its layers share their weights, and draw dropout masks of their own. A
    cell whose f carries on what it computed itself, such as a TrellisCell with "scan", would need more than its input.

    Args:
        cells: f_1, …, f_L.
        checkpoint: keep only the states and evaluate each layer again in the backward pass (T. Chen et al. 2016).
    """

    def __init__(self, cells: Iterable[Cell], *, checkpoint: bool = False) -> None:
        super().__init__()
        self.cells, self.checkpoint = nn.ModuleList(cells), checkpoint
        if not self.cells:
            raise ValueError("Stack(cells=[]): a stack has at least one cell; give one cell a layer.")

    @property
    def _cells(self) -> list[Cell]:
        return list(self.cells)  # pyright: ignore

    def forward(self, x: Float[Tensor, "B T D"], memory: tuple[Memory, ...] | None = None) -> LayerOutput:
        """The last layer's state under input ``x [B T D]``; the memory is a tuple, one entry a layer."""
        memories = (None,) * len(self.cells) if memory is None else memory
        contexts = [cell.prepare(x, past) for cell, past in zip(self._cells, memories, strict=True)]
        z = self._cells[0].start(contexts[0])
        kept: list[Memory] = []
        for cell, context in zip(self._cells, contexts, strict=True):
            kept.append(cell.remember(z, context))
            z = _layer(cell, z, context, checkpoint=self.checkpoint)
        return LayerOutput(
            z=z,
            memory=tuple(kept),
            f=lambda z: self.cells[-1](z, contexts[-1]),
            solution=None,
            output=self._cells[-1].output(z),
        )

    def cache(self, batch: int, *, memory: tuple[Memory, ...] | None = None, **choices: Any) -> tuple[Memory, ...]:
        """A memory for generation, one entry a layer; see ``Cell.cache``."""
        memories = (None,) * len(self.cells) if memory is None else memory
        choices["warm"] = False
        pairs = zip(self._cells, memories, strict=True)
        return tuple(cell.cache(batch, memory=past, **choices) for cell, past in pairs)


def _layer(cell: Cell, z: Tensor, context: Context, *, checkpoint: bool) -> Tensor:
    if not checkpoint or not torch.is_grad_enabled():
        return cell(z, context)
    # f draws no random numbers, so there is no state of a generator to bring back.
    return recomputed(cell, z, context, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore


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
