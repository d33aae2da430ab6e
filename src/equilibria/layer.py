"""What layers are made of and what they give back: Cell, Memory, Context, LayerOutput.

Letters: B batch, T time, D width, O channels of the output.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equilibria.solve import CompilableMap, Map, SelectableMap, Solution, map_tensors

Context = Any
"""What a cell computes once per solve: its own choice of value, constant during the solve."""
Memory = Any
"""What a cell remembers of one segment for the next: its own choice of value, detached, or None."""


class Cell(nn.Module, ABC):
    """One weight-tied map z ↦ f(z; x), split into what is constant during a solve and what is not."""

    @abstractmethod
    def prepare(self, x: Float[Tensor, "B T D"], memory: Memory) -> Context:
        """Everything that does not depend on z, with graph: once per forward pass."""

    @abstractmethod
    def start(self, context: Context) -> Tensor:
        """The first iterate z0."""

    def warm_start(self, context: Context) -> Tensor:
        """A first iterate made of what is remembered, near z* if neighbours resemble each other: here ``start``."""
        return self.start(context)

    @abstractmethod
    def forward(self, z: Tensor, context: Context) -> Tensor:
        """f(z): pure, so that the same inputs give the same bits."""

    def select(self, context: Context, rows: Int[Tensor, " R"]) -> Context:
        """The context of these samples alone, in this order, for a solve that goes on without those that are done.

        A cell that has it saves their evaluations; one that has not is always evaluated as a whole.
        """
        raise NotImplementedError(f"{type(self).__name__} has no select(context, rows).")

    @abstractmethod
    def remember(self, z: Tensor, context: Context) -> Memory:
        """What the next segment of the same streams needs of this one, detached."""

    def output(self, z: Tensor) -> Tensor:
        """What the layers after this one read of the state: here all of it."""
        return z

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: Memory = None,
        warm: bool = False,
    ) -> Memory:
        """A memory for generation, position by position and without gradients: here ``memory`` as it is.

        A cell that can do better keeps what it computes of each position once (see ``TransformerCell.cache``).

        Args:
            batch: rows.
            length: positions that are remembered; None for those of the cell.
            padding: positions at which the text of each row has not begun, for rows of different lengths.
            memory: of what came before.
            warm: start a position from the state of the one before it.
        """
        if padding is not None:
            raise ValueError(
                f"rows of different lengths need a memory that knows where each begins, and {type(self).__name__} has "
                "none; give rows of one length, or one row at a time."
            )
        return memory


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
        if not self._compiled or any(parameter.is_cuda for parameter in self.cell.parameters()):
            return None
        parameters = {name: parameter.detach() for name, parameter in self.cell.named_parameters()}
        return CellMap(self.cell, map_tensors(Tensor.detach, self.context), parameters=parameters)

    @property
    def _compiled(self) -> bool:
        return self.cell._compiled_call_impl is not None


@dataclasses.dataclass(frozen=True, eq=False)
class LayerOutput:
    """What a layer gives back, equilibrium or explicit."""

    z: Tensor
    """The state [B *state], which carries the gradient."""
    memory: Memory
    """For the next segment of the same streams."""
    f: Map
    """The map whose fixed point was sought (Stack: the last layer's), for stability measures."""
    solution: Solution | None
    """How the solve went; None from a Stack, which solves nothing."""
    output: Tensor = None  # pyright: ignore
    """What the layers after read of z; all of it where nothing is given."""
    auxiliary: tuple[Tensor, ...] = ()
    """The outputs of layers in between, for auxiliary losses, from an explicit network that was asked for them."""

    def __post_init__(self) -> None:
        if self.output is None:
            object.__setattr__(self, "output", self.z)
