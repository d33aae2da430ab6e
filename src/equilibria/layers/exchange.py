"""Lets only one thread at a time replace the buffers of a cell, because all threads share the module that has them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_LOCK = threading.Lock()
_THREADS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""The cells that are being evaluated with other buffers, and the thread that does it."""


@contextlib.contextmanager
def exchanging(cell: nn.Module) -> Iterator[None]:
    """Within it, this thread may replace the buffers of the cell; contexts of one thread may be nested.

    Raises:
        RuntimeError: another thread is doing it.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with _LOCK:
        before = _checked(cell)
        _THREADS[cell] = threading.get_ident()
    try:
        yield
    finally:
        with _LOCK:
            if before is None:
                del _THREADS[cell]


def own_buffers(cell: nn.Module) -> dict[str, Tensor]:
    """The buffers of the cell by name.

    Raises:
        RuntimeError: another thread has put others in their place.
    """
    if torch.compiler.is_compiling():
        return dict(cell.named_buffers())
    with _LOCK:
        _checked(cell)
        return dict(cell.named_buffers())


def _checked(cell: nn.Module) -> int | None:
    thread = _THREADS.get(cell)
    if thread not in (None, threading.get_ident()):
        raise RuntimeError(
            f"Two threads are training one {type(cell).__name__}, whose f writes buffers (running statistics, the "
            "vectors of spectral norm), and the buffers of one thread would be lost: give each thread its own "
            "copy.deepcopy(layer), or call layer.eval() if no thread trains it."
        )
    return thread
