"""Unrolled, Stack: explicit networks made of the same cells."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import is_grad_enabled, nn

from equilibria.checks import check_flag, check_whole
from equilibria.core.state import State
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients.repeats import Checkpoints
from equilibria.layers.cell import Buffers, Cell, CellMap, Prepared, as_cell
from equilibria.layers.equilibrium import Layer, LayerOutput, cache_of, check_no_method, prepared_by
from equilibria.layers.sequence import SequenceCell


class Unrolled(Layer):
    """The explicit, weight-tied network of depth L: z_l = f(z_{l−1}; inputs), z_0 = start, with back-propagation.

    All layers of a sequence cell read the same memory, made from the last state, so that the network tends to the
    equilibrium as L → ∞. At finite depth two segments joined by memory are therefore not exactly one long segment; for
    ``Stack`` they are.

    Args:
        cell: the map f: a ``Cell``, or any ``nn.Module`` f(z, *inputs).
        depth: L, the number of evaluations of f.
        checkpoint: keep only the states and evaluate f again in the backward pass (T. Chen et al. 2016).
        auxiliary_every: k: in training, also return the outputs of layers k, 2k, … for auxiliary losses; 0 for none.
    """

    def __init__(self, cell: nn.Module, depth: int, *, checkpoint: bool = False, auxiliary_every: int = 0) -> None:
        super().__init__()
        check_whole("Unrolled", depth=depth, auxiliary_every=auxiliary_every)
        check_flag("Unrolled", checkpoint=checkpoint)
        if depth is None or depth < 1:
            raise ValueError(f"Unrolled(depth={depth}): a network has at least one layer; try depth=12.")
        if not 0 <= auxiliary_every <= depth:
            raise ValueError(
                f"Unrolled(depth={depth}, auxiliary_every={auxiliary_every}): auxiliary_every lies between 0 (no "
                "auxiliary outputs) and the depth; try a fifth of the depth."
            )
        self.cell = as_cell(cell)
        self.depth, self.checkpoint, self.auxiliary_every = depth, checkpoint, auxiliary_every

    def forward(
        self,
        *inputs: Any,
        start: State | None = None,
        method: Method | None = None,
        depth: int | None = None,
        **options: Any,
    ) -> LayerOutput:
        """The last state under ``inputs``.

        Args:
            inputs: arguments of the cell's ``prepare``, or of the module after z.
            start: z_0; None for the cell's own first iterate.
            method: None, since nothing is solved; the argument makes the network callable like an ``Equilibrium``.
            depth: number of layers this time; None for all of them.
            options: options of the cell's ``prepare``.

        Raises:
            TypeError: ``method`` is given.
        """
        check_no_method(self, method)
        prepared, checkpoints = prepared_by(self.cell, *inputs, **options), _checkpoints(self.checkpoint)
        z, auxiliary = self.cell.begin(prepared, start), []
        for layer in range(1, layers_used(depth, self.depth) + 1):
            z = _applied(self.cell, z, prepared, checkpoints)
            if self.training and self.auxiliary_every and layer % self.auxiliary_every == 0:
                auxiliary.append(self.cell.output(z))
        return LayerOutput(
            output=self.cell.output(z),
            z=z,
            f=CellMap(self.cell, prepared),
            solution=None,
            memory=self.cell.remembered(z, prepared),
            auxiliary=tuple(auxiliary),
        )

    def cache(self, batch: int, **choices: Any) -> Any:
        """A memory for generation; see ``SequenceCell.cache``."""
        choices["warm"] = False  # a network of fixed depth starts where it was trained to start
        return cache_of(self.cell, batch, **choices)

    def extra_repr(self) -> str:
        """The depth and the other settings."""
        return f"depth={self.depth}, checkpoint={self.checkpoint}, auxiliary_every={self.auxiliary_every}"


class Stack(Layer):
    """The explicit network of L cells, each applied once: z_l = f_l(z_{l−1}; inputs).

    The inputs enter every cell through its ``prepare``, and z_0 is the start of the first. A cell may occur several
    times: then its layers share their weights, but draw separate dropout masks.

    Sequence cells have one memory each, in a tuple. A layer remembers its input z_{l−1}, from which its keys and values
    are computed (Dai et al. 2019, eq. 3), so that two segments joined by memory are one long segment. A cell whose f
    reads its own result at earlier times, such as a TrellisCell with "scan", would have to remember more than its
    input.

    Args:
        cells: f_1, …, f_L: cells, or any modules f_l(z, *inputs); either all are sequence cells or none is.
        checkpoint: keep only the states and evaluate each layer again in the backward pass (T. Chen et al. 2016).
        depth: the layers that are used if a call does not say otherwise, the first ones; None for all.
    """

    def __init__(self, cells: Iterable[nn.Module], *, checkpoint: bool = False, depth: int | None = None) -> None:
        super().__init__()
        check_flag("Stack", checkpoint=checkpoint)
        if isinstance(cells, nn.Module) and not isinstance(cells, nn.ModuleList | nn.Sequential):
            raise TypeError(f"Stack(cells={type(cells).__name__}): give a list of modules, one for each layer.")
        self.cells, self.checkpoint = nn.ModuleList(as_cell(cell) for cell in cells), checkpoint
        if not self.cells:
            raise ValueError("Stack(cells=[]): a stack has at least one cell; give one cell per layer.")
        self.depth = layers_used(depth, len(self.cells))
        kinds = {isinstance(cell, SequenceCell) for cell in self.cells}
        if len(kinds) > 1:
            names = ", ".join(type(cell).__name__ for cell in self.cells)
            raise ValueError(f"Stack(cells=…) of {names}: either all cells are SequenceCells, or none is.")
        self._remembers = kinds == {True}

    @property
    def _cells(self) -> list[Cell]:
        return list(self.cells)  # pyright: ignore

    def forward(
        self,
        *inputs: Any,
        start: State | None = None,
        method: Method | None = None,
        depth: int | None = None,
        **options: Any,
    ) -> LayerOutput:
        """The last layer's state under ``inputs``.

        Args:
            inputs: arguments of each cell's ``prepare``; for sequence cells x and a tuple of memories, or None.
            start: z_0; None for the first cell's own first iterate.
            method: None, since nothing is solved; the argument makes the network callable like an ``Equilibrium``.
            depth: number of layers this time, the first ones; those after them remember nothing. None for all.
            options: options of each cell's ``prepare``.

        Raises:
            TypeError: ``method`` is given.
        """
        check_no_method(self, method)
        used = layers_used(self.depth if depth is None else depth, len(self.cells))
        prepared, checkpoints = self._prepared(inputs, options, used), _checkpoints(self.checkpoint)
        z, kept = self._cells[0].begin(prepared[0], start), []
        for cell, constants in zip(self._cells[:used], prepared, strict=True):
            # The first z may be the input itself, which belongs to the caller.
            kept.append(cell.remember(z, constants) if kept else cell.remembered(z, constants))
            z = _applied(cell, z, constants, checkpoints)
        return LayerOutput(
            output=self._cells[used - 1].output(z),
            z=z,
            f=CellMap(self._cells[used - 1], prepared[-1]),
            solution=None,
            memory=(*kept, *(None,) * (len(self.cells) - used)) if self._remembers else None,
        )

    def _prepared(self, inputs: Sequence[Any], options: dict[str, Any], used: int) -> list[Prepared]:
        if not self._remembers:
            return [prepared_by(cell, *inputs, **options) for cell in self._cells[:used]]
        x, memory, *rest = inputs if len(inputs) > 1 else (*inputs, None)
        pairs = zip(self._cells[:used], self._memories(memory), strict=False)
        return [prepared_by(cell, x, past, *rest, **options) for cell, past in pairs]

    def _memories(self, memory: Any) -> tuple[Any, ...]:
        """One memory per layer; all None for None."""
        layers = len(self.cells)
        if memory is not None and (type(memory) not in (tuple, list) or len(memory) != layers):
            found = f"{len(memory)} memories" if type(memory) in (tuple, list) else f"a {type(memory).__name__}"
            raise ValueError(
                f"the memory of a Stack of {layers} layers is {found}; give the memory that the stack returned, one "
                "entry per layer, or None where the streams begin."
            )
        return (None,) * layers if memory is None else tuple(memory)

    def cache(self, batch: int, *, memory: tuple[Any, ...] | None = None, **choices: Any) -> tuple[Any, ...]:
        """A memory for generation, one entry per layer; see ``SequenceCell.cache``."""
        choices["warm"] = False
        pairs = zip(self._cells[: self.depth], self._memories(memory), strict=False)
        caches = (cache_of(cell, batch, memory=past, **choices) for cell, past in pairs)
        return (*caches, *(None,) * (len(self.cells) - self.depth))


def layers_used(depth: int | None, layers: int) -> int:
    """The number of layers out of ``layers`` that a network of ``depth`` layers has; all for None."""
    if depth is None:
        return layers
    check_whole("a network", depth=depth)
    if not 1 <= depth <= layers:
        raise ValueError(f"depth={depth} of a network of {layers} layers; give 1 to {layers}, or None for all.")
    return depth


def _checkpoints(wanted: bool) -> Checkpoints | None:
    """The checkpoints of one forward pass, which warn if a weight or an input has changed before the backward pass."""
    return Checkpoints(Stop(rtol=0), "warn", coupled=True) if wanted and is_grad_enabled() else None


def _applied(cell: Cell, z: State, prepared: Prepared, checkpoints: Checkpoints | None) -> State:
    if checkpoints is None:
        return cell(z, prepared)
    # When the backward pass begins, ``functional_call`` has put the cell's own weights back.
    f, buffers = CellMap(cell, prepared).bound(), Buffers.of(cell)
    evaluations: Iterator[CellMap] = itertools.repeat(f)
    if buffers is not None:
        # f may write into its buffers, as batch norm does: it is evaluated again with copies of those that it had.
        evaluations = itertools.chain([f], itertools.repeat(dataclasses.replace(f, buffers=buffers)))
    return checkpoints.call(lambda z: next(evaluations)(z), z)
