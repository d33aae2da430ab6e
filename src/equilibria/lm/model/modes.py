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

    A mode belongs to a module and not to a thread. So if several threads switch a module to the same mode, the first
    one does it, and the last one restores its own mode.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    with _LOCK:
        switched = [(module, _switch(module, training=training)) for module in modules]
    try:
        yield
    finally:
        with _LOCK:
            for module, switch in switched:
                if switch is not None:
                    _leave(module, switch, training=not training)


@dataclasses.dataclass(eq=False)
class _Switch:
    """A module is in another mode than its own for so many contexts."""

    contexts: int = 0


_LOCK = threading.Lock()
_SWITCHES: weakref.WeakKeyDictionary[nn.Module, list[_Switch]] = weakref.WeakKeyDictionary()
"""The modules that are not in their own mode; one switch may follow another."""


def _switch(module: nn.Module, *, training: bool) -> _Switch | None:
    """Switch the module, or join the switch that another context has made; None if its own mode is the wanted one."""
    if module.training != training:
        module.training = training
        _SWITCHES.setdefault(module, []).append(_Switch())
    elif not _SWITCHES or module not in _SWITCHES:
        return None
    switch = _SWITCHES[module][-1]
    switch.contexts += 1
    return switch


def _leave(module: nn.Module, switch: _Switch, *, training: bool) -> None:
    switch.contexts -= 1
    if switch.contexts:
        return
    module.training = training
    _SWITCHES[module].remove(switch)
    if not _SWITCHES[module]:
        del _SWITCHES[module]


@contextlib.contextmanager
def eval_mode(model: object) -> Iterator[None]:
    """Within it, all submodules are in evaluation mode, and no gradients are recorded."""
    with in_mode(model, training=False), torch.no_grad():
        yield
