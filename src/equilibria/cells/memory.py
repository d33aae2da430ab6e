"""What every cell asks of a memory and of a cache before it reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def check_streams(streams: int, x: Tensor) -> None:
    """Refuse a memory of other streams than those of the input.

    Raises:
        ValueError: their numbers differ.
    """
    if streams != len(x):
        raise ValueError(
            f"the memory is of {streams} streams and the input of {len(x)}; a memory continues the streams that it "
            "came from, so pass memory=None where new ones begin."
        )


def check_cache_use(cell: nn.Module) -> None:
    """Refuse a cache where gradients are recorded, or where something would be dropped.

    Raises:
        ValueError: autograd records, or the cell is in training mode.
    """
    if torch.is_grad_enabled():
        raise ValueError("a cache has no gradient; use it under torch.no_grad().")
    _check_evaluation(cell)


def check_new_cache(cell: nn.Module, batch: int, *, kind: type, memory: Any, padding: Tensor | None) -> None:
    """Refuse to make a cache that could not be exact.

    Args:
        cell: in evaluation mode.
        batch: rows, at least one.
        kind: of the memory that the cell gives without cache.
        memory: of that kind, or None.
        padding: in front of the rows; only without memory.

    Raises:
        ValueError: one of them is otherwise.
    """
    if batch < 1:
        raise ValueError(f"cache(batch={batch}): a cache is for at least one row.")
    _check_evaluation(cell)
    if memory is not None and not isinstance(memory, kind):
        raise ValueError(
            f"the memory is a {type(memory).__name__}, and a cache is made from a {kind.__name__}, as a solve without "
            "cache gives it; where there is a cache already, go on with that."
        )
    if memory is not None and padding is not None:
        raise ValueError(
            "padding stands before the text of a row, and the memory would stand before the padding; give rows of one "
            "length, or no memory."
        )


def _check_evaluation(cell: nn.Module) -> None:
    if cell.training:
        raise ValueError("a cache is for evaluation mode, where nothing is dropped; call model.eval() first.")
