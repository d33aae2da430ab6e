"""SequenceCell: a cell on sequences, with memory from segment to segment and generation position by position.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equilibria.core.state import State
from equilibria.core.trees import map_tensors, tensors_in
from equilibria.layers.cell import Cell, Prepared
from equilibria.layers.dropout import BatchSlice

Memory = Any
"""The memory of one segment for the next: a tree of detached tensors with the batch first, or None."""


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
        key_padding_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Prepared:
        """Compute what does not depend on z, with graph, once per forward pass.

        Args:
            x: the input.
            memory: memory of the previous segment, or a cache; None where the streams begin.
            warm: start from the remembered state instead of the cell's own start; it is near z* if neighbouring
                positions resemble each other.
            part: the rows of the whole batch that x holds, for random numbers.
            key_padding_mask: True at padding, before or after a text: f is 0 there, and no other position
                sees it, so that a row has the states and gradients that it has alone. None if there is no padding.
        """

    @abstractmethod
    def start(self, prepared: Prepared) -> State:
        """The first iterate z0."""

    def begin(self, prepared: Prepared, given: State | None) -> State:
        """The first iterate of a solve: ``given``, in the shape of ``start(prepared)``, or else ``start(prepared)``."""
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
        """The memory for the next segment of the same streams, detached."""

    def remembered(self, z: State, prepared: Prepared) -> Memory:
        """``remember`` of a copy: a caller who changes z in place, as in ``out.z += x``, does not change the memory."""
        return self.remember(map_tensors(lambda leaf: leaf.detach().clone(), z), prepared)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: Memory = None,
        warm: bool = False,
    ) -> Memory:
        """A memory for generating position by position, without gradients; by default ``memory`` itself.

        A cell may override it to compute the values of each position only once (see ``TransformerCell.cache``).

        Args:
            batch: number of streams.
            length: number of positions to remember; None for the cell's own.
            padding: number of positions before the text of each stream begins, for texts of different lengths.
            memory: the memory of the text before.
            warm: start each position from the state of the previous one.

        Raises:
            ValueError: padding is given, and the cell does not support it.
        """
        if padding is not None:
            raise ValueError(
                f"texts of different lengths need a cache that skips padding, and {type(self).__name__} has none; give "
                "texts of one length, or one text at a time."
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


def check_key_padding_mask(
    mask: Tensor | None, x: Float[Tensor, "B T D"], begun: Bool[Tensor, " B"] | None = None
) -> None:
    """Raise a ValueError unless the mask is None, or a bool for each position of x with padding around the texts.

    Args:
        mask: True at padding.
        x: the input.
        begun: True for rows whose memory holds text; None if no row has a memory.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask has the shape {tuple(mask.shape)} and dtype {mask.dtype}, and must be a bool for each "
            f"of the {tuple(x.shape[:2])} positions, True at padding; for a mask with 1 at text give mask == 0."
        )
    text = ~mask
    starts = (text[:, 1:] & ~text[:, :-1]).sum(dim=1)
    pieces = starts + (text[:, 0] if begun is None else text[:, 0] | begun)
    if bool((pieces > 1).any()):
        raise ValueError(
            f"key_padding_mask puts padding inside the text of {int((pieces > 1).sum())} rows, or between a memory and "
            "the text that continues it; give padding before or after a whole text."
        )


def check_streams(streams: int, x: Tensor) -> None:
    """Raise a ValueError unless the memory and the input have the same number of streams."""
    if streams != len(x):
        raise ValueError(
            f"the memory is of {streams} streams and the input of {len(x)}; a memory continues the streams that it "
            "came from, so pass memory=None where new ones begin."
        )


def check_cache_use(cell: nn.Module) -> None:
    """Raise a ValueError if a cache is used while autograd records, or in training mode."""
    if torch.is_grad_enabled():
        raise ValueError("a cache has no gradient; use it under torch.no_grad().")
    _check_evaluation(cell)


def check_new_cache(cell: nn.Module, batch: int, *, kind: type, memory: Any, padding: Tensor | None) -> None:
    """Raise a ValueError if a new cache could not be exact.

    Args:
        cell: the cell, in evaluation mode.
        batch: number of streams, at least one.
        kind: the type of the memory that the cell returns without a cache.
        memory: a memory of that type, or None.
        padding: number of positions before the text of each stream begins; only without a memory.
    """
    if batch < 1:
        raise ValueError(f"cache(batch={batch}): a cache is for at least one stream.")
    _check_evaluation(cell)
    if memory is not None and not isinstance(memory, kind):
        raise ValueError(
            f"the memory is a {type(memory).__name__}, and a cache is made from a {kind.__name__}, as a solve without "
            "cache returns it; if you have a cache already, continue with that."
        )
    if memory is not None and padding is not None:
        raise ValueError(
            "padding stands before the text of a stream, so no memory can come right before the text; give texts of "
            "one length, or no memory."
        )


def _check_evaluation(cell: nn.Module) -> None:
    if cell.training:
        raise ValueError("a cache is for evaluation mode, where nothing is dropped; call model.eval() first.")
