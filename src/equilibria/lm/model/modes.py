"""Context managers for training and evaluation mode that restore the mode of every submodule afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def in_mode(model: object, *, training: bool) -> Iterator[None]:
    """Within it, all submodules are in training or in evaluation mode; nothing happens if it is not a module.

    A mode belongs to a module and not to a thread. So a module is in the mode that the newest context wants, in
    whatever order the contexts of several threads end, and the last one restores its own mode.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    context = object()
    with _LOCK:
        switched = [module for module in modules if _switch(module, context, training=training)]
    try:
        yield
    finally:
        with _LOCK:
            for module in switched:
                _leave(module, context)


@dataclasses.dataclass(eq=False)
class _Switched:
    """The own mode of a module that is in another one."""

    own: bool
    wanted: dict[object, bool]
    """For each open context the mode that it asks for, in the order in which they were opened."""


_LOCK = threading.Lock()
_SWITCHED: weakref.WeakKeyDictionary[nn.Module, _Switched] = weakref.WeakKeyDictionary()


def _switch(module: nn.Module, context: object, *, training: bool) -> bool:
    """Switch the module, and return True; False if its own mode is the wanted one, and no other context wants one."""
    if module.training == training and (not _SWITCHED or module not in _SWITCHED):
        return False
    _SWITCHED.setdefault(module, _Switched(module.training, {})).wanted[context] = training
    module.training = training
    return True


def _leave(module: nn.Module, context: object) -> None:
    switched = _SWITCHED[module]
    del switched.wanted[context]
    module.training = next(reversed(switched.wanted.values()), switched.own)
    if not switched.wanted:
        del _SWITCHED[module]


@contextlib.contextmanager
def eval_mode(model: object) -> Iterator[None]:
    """Within it, all submodules are in evaluation mode, and no gradients are recorded."""
    with in_mode(model, training=False), torch.no_grad():
        yield
