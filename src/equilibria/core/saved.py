"""Saved tensors under hooks, such as those of torch.utils.checkpoint: each is unpacked once per backward pass.

The adjoint solve goes through the graph of f(z*) once per VJP. Autograd unpacks the tensors of the graph each time, and
for a checkpoint each of these times is another forward pass: 14 evaluations of f became 196.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from equilibria.torch_private import at_the_end, hooks_on_saved_tensors


def kept() -> contextlib.AbstractContextManager[Any]:
    """A context in which a graph keeps the tensors that it saves, past all hooks; for VJPs that follow at once."""
    return contextlib.nullcontext() if hooks_on_saved_tensors() is None else saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Handle:
    """The stand-in for a tensor that a graph saves."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.tensor: Tensor | None = None


class SavedTensors:
    """The tensors that one graph saves, packed by the hooks that were active when it was made."""

    def __init__(self) -> None:
        # Weak, since autograd frees what a backward pass no longer needs node by node.
        self._handles: list[weakref.ref[_Handle]] = []
        self._unpack: Callable[[Any], Tensor] = _same

    def recorded(self) -> contextlib.AbstractContextManager[Any]:
        """A context for making the graph; without hooks from outside it changes nothing."""
        hooks = hooks_on_saved_tensors()
        if hooks is None:
            return contextlib.nullcontext()
        pack, self._unpack = hooks

        def packed(tensor: Tensor) -> _Handle:
            handle = _Handle(pack(tensor))
            self._handles.append(weakref.ref(handle))
            return handle

        return saved_tensors_hooks(packed, self._unpacked)

    def _unpacked(self, handle: _Handle) -> Tensor:
        return self._unpack(handle.packed) if handle.tensor is None else handle.tensor

    def unpack(self) -> None:
        """Unpack all tensors for the rest of the running backward pass; VJPs within it then find them."""
        for handle in self._alive():
            handle.tensor = self._unpack(handle.packed)
        if self._handles:
            at_the_end(self._release)

    def _release(self) -> None:
        for handle in self._alive():
            handle.tensor = None

    def _alive(self) -> Iterator[_Handle]:
        for weak in self._handles:
            handle = weak()
            if handle is not None:
                yield handle
