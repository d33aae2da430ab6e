"""Context managers for training and evaluation mode that restore the mode of every submodule afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def in_mode(model: object, *, training: bool) -> Iterator[None]:
    """Within it, all submodules are in training or in evaluation mode; nothing happens if it is not a module."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    switched = [module for module in modules if module.training != training]
    for module in switched:
        module.training = training
    try:
        yield
    finally:
        for module in switched:
            module.training = not training


@contextlib.contextmanager
def eval_mode(model: object) -> Iterator[None]:
    """Within it, all submodules are in evaluation mode, and no gradients are recorded."""
    with in_mode(model, training=False), torch.no_grad():
        yield
