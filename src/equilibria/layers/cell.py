"""Cell: one weight-tied map z ↦ f(z; inputs), split into what is constant during a solve and what is not.

Letters: B batch, R chosen samples.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from equilibria.core.maps import Linearised, Map, linearised, linearised_for_products
from equilibria.core.state import State
from equilibria.core.trees import map_tensors, take_rows, tensors_in, with_tensors
from equilibria.layers.exchange import exchanging, own_buffers
from equilibria.torch_private import as_written, is_compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The values that a cell computes once per forward pass, with graph, and that stay constant during the solve."""

    shared: Any = ()
    """Values that all samples share, such as effective weights; they stay whole when samples are dropped."""
    rows: Any = None
    """A tree (dicts, tuples, lists, dataclasses) of tensors with the batch as first axis, in any order in memory, from
    which converged samples are dropped. None if the values cannot be divided by samples."""
    kept: Any = None
    """Values that ``start`` and ``remember`` read, but f does not."""
    droppable: bool = True
    """False where dropping samples costs more than it saves."""


class Cell(nn.Module, ABC):
    """One weight-tied map z ↦ f(z; inputs). Only ``forward`` must be written.

    The inputs may be anything, and the state is a tensor ``[B *shape]`` or a tree of such tensors.
    """

    def prepare(self, *inputs: Any, **options: Any) -> Prepared:
        """Compute what does not depend on z, with graph, once per forward pass; by default the inputs are passed on."""
        if options:
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(sorted(options))}; leave it out, or add it to "
                "the cell's prepare."
            )
        return Prepared(shared=inputs)

    def start(self, prepared: Prepared) -> State:
        """The first iterate z0; by default zeros like the first input, which must then be one floating tensor.

        Raises:
            TypeError: the first input is no floating tensor; call the layer with ``start=``.
        """
        first = prepared.shared[0] if isinstance(prepared.shared, tuple) and prepared.shared else None
        if isinstance(first, Tensor) and first.is_floating_point():
            return torch.zeros_like(first)
        found = "there is no input" if first is None else f"the first input is {_kind(first)}"
        raise TypeError(
            f"{type(self).__name__} cannot tell the shape of its state, since {found}: call the layer with "
            "start=torch.zeros(…), a state or a tree of tensors [B *shape]."
        )

    def begin(self, prepared: Prepared, given: State | None) -> State:
        """The first iterate of a solve: ``given`` by the caller, or else ``start(prepared)``."""
        return self.start(prepared) if given is None else given

    @abstractmethod
    def forward(self, z: State, prepared: Prepared) -> State:
        """f(z): pure, so that the same inputs give the same bits."""

    def output(self, z: State) -> Any:
        """The part of the state that later layers read; by default all of it."""
        return z

    def remember(self, z: State, prepared: Prepared) -> Any:
        """The memory for the next segment of the same streams; by default None, see ``SequenceCell``."""
        return None

    def remembered(self, z: State, prepared: Prepared) -> Any:
        """``remember`` for a layer, which hands z out to its caller."""
        return self.remember(z, prepared)


def check_rows(prepared: Prepared, z0: State) -> None:
    """Raise a ValueError unless every tensor of ``prepared.rows`` has one entry per sample of ``z0``."""
    if prepared.rows is None or not prepared.droppable:
        return
    batch = len(tensors_in(z0)[0])
    for tensor in tensors_in(prepared.rows):
        if tensor.ndim == 0 or len(tensor) != batch:
            raise ValueError(
                f"Prepared(rows=…) holds a tensor of shape {tuple(tensor.shape)} for a batch of {batch} samples; rows "
                "are divided by samples, so each of their tensors has the batch as first axis: put what all samples "
                "share into Prepared(shared=…)."
            )


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class ModuleCell(Cell):
    """A cell made of any ``nn.Module`` f(z, *inputs); its converged samples stay in the batch.

    Args:
        module: the map. It must give the same bits when called twice, so it may draw no dropout masks.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: State, prepared: Prepared) -> State:
        """module(z, *inputs)."""
        return self.module(z, *prepared.shared)


def as_cell(module: nn.Module) -> Cell:
    """``module`` as a ``Cell``: itself if it is one, else a ``ModuleCell``. Every plain module becomes a cell here.

    Raises:
        TypeError: it is not an ``nn.Module``.
    """
    if isinstance(module, Cell):
        return module
    if not isinstance(module, nn.Module):
        found = f"the class {module.__name__}" if isinstance(module, type) else repr(module)
        raise TypeError(
            f"cell is {found}; it must be an nn.Module f(z, *inputs), or a Cell such as "
            "TransformerCell(TransformerConfig()). For a function without parameters of its own use fixed_point."
        )
    return ModuleCell(module)


class Buffers:
    """The buffers of a cell during a forward pass, such as the running statistics of batch norm.

    Every evaluation of f starts from the buffers as they were before the forward pass, so that f gives the same bits
    twice. At the end the cell keeps the buffers of the last evaluation: one update per forward pass, at the
    equilibrium.
    """

    def __init__(self, cell: Cell) -> None:
        self._own = own_buffers(cell)
        for name, buffer in self._own.items():
            if is_lazy(buffer):
                raise ValueError(
                    f"The buffer {name} inside f has no shape yet, and a solve starts every evaluation of f from "
                    "copies of the buffers: call the lazy module once before, module(z0, *inputs)."
                )
        self._first = {name: buffer.clone() for name, buffer in self._own.items()}
        self._last: dict[str, Tensor] = {}

    @classmethod
    def of(cls, cell: Cell) -> Buffers | None:
        """The buffers of a cell in training; None in evaluation, and for a cell without buffers."""
        return cls(cell) if cell.training and any(True for _ in cell.buffers()) else None

    def copies(self) -> dict[str, Tensor]:
        """Copies of the first buffers, for one evaluation."""
        self._last = {name: buffer.clone() for name, buffer in self._first.items()}
        return self._last

    def keep(self) -> None:
        """Write the buffers of the last evaluation into the cell."""
        with torch.no_grad():
            for name, buffer in self._last.items():
                # Batch norm does not mark what it has written, and a comparison on a GPU would wait for it.
                if buffer.device.type != "cpu" or not torch.equal(buffer, self._first[name]):
                    self._own[name].copy_(buffer)


@dataclasses.dataclass(frozen=True, eq=False)
class CellMap(Map):
    """f(·; inputs) of a cell."""

    cell: Cell
    prepared: Prepared
    buffers: Buffers | None = None
    weights: dict[str, Tensor] | None = None
    """Replacements for the cell's parameters and buffers; None for its own."""
    past_compilation: bool = False
    """True to run the code of f as it is written, even if the cell is compiled."""

    def __call__(self, z: State) -> State:
        """f(z), compiled if the cell is."""
        if self.buffers is None:
            return self._with(z, self.weights or {})
        with exchanging(self.cell):
            return self._with(z, (self.weights or {}) | self.buffers.copies())

    def _with(self, z: State, held: dict[str, Tensor]) -> State:
        """f(z) of the cell with these parameters and buffers in place of its own."""
        if not held:
            return (as_written(self.cell) if self.past_compilation else self.cell)(z, self.prepared)
        if not self.past_compilation:
            return torch.func.functional_call(self.cell, held, (z, self.prepared))
        within = {f"cell.{name}": tensor for name, tensor in held.items()}
        return torch.func.functional_call(_Forward(self.cell), within, (z, self.prepared))

    def eager(self) -> CellMap:
        """f without compilation."""
        return dataclasses.replace(self, past_compilation=True) if self._compiled else self

    def jvp(self, z: State, v: State) -> State:
        """J(z)·v; compiled code has no forward-mode derivative."""
        return self.eager().jvp(z, v) if self._compiled else super().jvp(z, v)

    def linearise(self, z: State, *, create_graph: bool = False) -> Linearised:
        """f(z) with graph; VJPs of a compiled cell use a second compiled graph, in which only z requires a gradient.

        The reason: the backward pass of compiled code computes the gradients of all its inputs, requested or not.
        """
        if not self._compiled:
            return linearised(self, z, create_graph=create_graph)
        # The second graph was never tested on a GPU, and compiled code has no second derivative on any device.
        if create_graph or any(parameter.is_cuda for parameter in self.cell.parameters()):
            return linearised(self.eager(), z, create_graph=create_graph)
        parameters = {name: parameter.detach() for name, parameter in self.cell.named_parameters()}
        prepared = map_tensors(Tensor.detach, self.prepared)
        alone = dataclasses.replace(self, prepared=prepared, weights=parameters)
        point, z = linearised(self, z), map_tensors(Tensor.detach, z)
        return dataclasses.replace(point, again=partial(linearised_for_products, alone, z, point.autocast))

    def reads(self) -> tuple[Tensor, ...]:
        """The prepared tensors, then the cell's parameters and buffers."""
        own = self.pinned()
        return *tensors_in(own.prepared), *own._weights.values()

    def given(self, tensors: Sequence[Tensor]) -> CellMap:
        """The uncompiled map with these prepared tensors, parameters and buffers."""
        own = self.pinned()
        prepared = with_tensors(own.prepared, tensors)
        weights = dict(zip(own._weights, tensors[len(tensors_in(own.prepared)) :], strict=True))
        return dataclasses.replace(own, prepared=prepared, weights=weights)

    def pinned(self) -> CellMap:
        """The uncompiled map with the weights of this moment; ``functional_call`` may later replace them."""
        prepared = dataclasses.replace(self.prepared, kept=None)
        return dataclasses.replace(self, prepared=prepared, weights=self._weights, past_compilation=True)

    def bound(self) -> CellMap:
        """The map with the parameters of this moment, compiled if the cell is; f can still replace buffers."""
        if self.weights is not None:
            return self
        return dataclasses.replace(self, weights=dict(self.cell.named_parameters()))

    @property
    def _weights(self) -> dict[str, Tensor]:
        if self.weights is not None:
            return self.weights
        return dict((*self.cell.named_parameters(), *self.cell.named_buffers()))

    def rows(self, index: Int[Tensor, " R"]) -> CellMap | None:
        """f for these samples; None if what the cell prepares cannot be divided by samples."""
        if self.prepared.rows is None or not self.prepared.droppable:
            return None
        prepared = dataclasses.replace(self.prepared, rows=take_rows(self.prepared.rows, index), kept=None)
        return dataclasses.replace(self, prepared=prepared)

    @property
    def _compiled(self) -> bool:
        return is_compiled(self.cell) and not self.past_compilation


class _Forward(nn.Module):
    """A cell that is called without compiled code."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, z: State, prepared: Prepared) -> State:
        return as_written(self.cell)(z, prepared)
