"""SequenceCell: a cell on sequences, which remembers one segment for the next and can generate position by position.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equilibria.core.state import State
from equilibria.core.trees import tensors_in
from equilibria.layers.cell import Cell, Prepared
from equilibria.layers.dropout import BatchSlice

Memory = Any
"""What a cell remembers of one segment for the next: a tree of detached tensors with the batch first, or None."""


class SequenceCell(Cell, ABC):
    """A causal map on states ``[B T *]``: two segments joined by memory have the equilibrium of one long segment."""

    @abstractmethod
    def prepare(
        self,
        x: Float[Tensor, "B T D"],
        memory: Memory = None,
        *,
        warm: bool = False,
        part: BatchSlice | None = None,
    ) -> Prepared:
        """Everything that does not depend on z, with graph: once per forward pass.

        Args:
            x: the input.
            memory: of the segment before, or a cache; None where the streams begin.
            warm: start from what is remembered, near z* if neighbours resemble each other, instead of the cell's own
                start.
            part: which rows of the whole batch these are, for random numbers.
        """

    @abstractmethod
    def start(self, prepared: Prepared) -> State:
        """The first iterate z0."""

    def begin(self, prepared: Prepared, given: State | None) -> State:
        """The first iterate of a solve: ``given`` by the caller, in the shape of ``start(prepared)``, or that."""
        own = self.start(prepared)
        if given is None:
            return own
        shapes = [[tuple(tensor.shape) for tensor in tensors_in(state)] for state in (given, own)]
        if shapes[0] != shapes[1]:
            found, wanted = (" and ".join(map(str, shape)) for shape in shapes)
            raise ValueError(
                f"start has the shape {found} and the state {wanted}; give a state of this input's batch and length, "
                "for example the z of an earlier output, or None."
            )
        return given.to(own) if isinstance(own, Tensor) else given

    @abstractmethod
    def remember(self, z: State, prepared: Prepared) -> Memory:
        """What the next segment of the same streams needs of this one, detached."""

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

        Raises:
            ValueError: the cell cannot tell where each row begins.
        """
        if padding is not None:
            raise ValueError(
                f"rows of different lengths need a memory that knows where each begins, and {type(self).__name__} has "
                "none; give rows of one length, or one row at a time."
            )
        return memory


def sequence_cell(cell: Cell) -> SequenceCell:
    """``cell``, if it is a ``SequenceCell``.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(cell, SequenceCell):
        raise TypeError(
            f"{type(cell).__name__} keeps no past, so it has neither memory nor cache; generation and explicit stacks "
            "of segments need a SequenceCell, such as TransformerCell or TrellisCell."
        )
    return cell


def check_width(x: Tensor, width: int) -> None:
    """Raise a ValueError unless x has ``width`` channels."""
    if x.shape[2] != width:
        raise ValueError(f"the input has {x.shape[2]} channels and the cell reads {width}; give both the same width.")


def check_streams(streams: int, x: Tensor) -> None:
    """Raise a ValueError if a memory is of another number of streams than the input."""
    if streams != len(x):
        raise ValueError(
            f"the memory is of {streams} streams and the input of {len(x)}; a memory continues the streams that it "
            "came from, so pass memory=None where new ones begin."
        )


def check_cache_use(cell: nn.Module) -> None:
    """Raise a ValueError if a cache is used where autograd records, or where something would be dropped."""
    if torch.is_grad_enabled():
        raise ValueError("a cache has no gradient; use it under torch.no_grad().")
    _check_evaluation(cell)


def check_new_cache(cell: nn.Module, batch: int, *, kind: type, memory: Any, padding: Tensor | None) -> None:
    """Raise a ValueError if a cache could not be exact.

    Args:
        cell: in evaluation mode.
        batch: rows, at least one.
        kind: of the memory that the cell gives without cache.
        memory: of that kind, or None.
        padding: in front of the rows; only without memory.
    """
    if batch < 1:
        raise ValueError(f"cache(batch={batch}): a cache is for at least one row.")
    _check_evaluation(cell)
    if memory is not None and not isinstance(memory, kind):
        raise ValueError(
            f"the memory is a {type(memory).__name__}, and a cache is made from a {kind.__name__}, as a solve without "
            "cache gives it; where there is a cache already, continue with that."
        )
    if memory is not None and padding is not None:
        raise ValueError(
            "padding stands before the text of a row, and the memory would stand before the padding; give rows of one "
            "length, or no memory."
        )


def _check_evaluation(cell: nn.Module) -> None:
    if cell.training:
        raise ValueError("a cache is for evaluation mode, where nothing is dropped; call model.eval() first.")
