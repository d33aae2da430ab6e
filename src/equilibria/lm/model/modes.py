"""Training and evaluation mode for a while: afterwards every part of a model has its own mode back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def in_mode(model: object, *, training: bool) -> Iterator[None]:
    """The model and all its parts in training or in evaluation mode; what is no ``nn.Module`` has no mode."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = training
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with in_mode(model, training=False), torch.no_grad():
        yield
