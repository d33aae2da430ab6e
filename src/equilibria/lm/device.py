"""Devices: choosing one, the device of a model, and moving a segment to it."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from equilibria.lm.corpora import Segment


def choose_device(name: str) -> torch.device:
    """The device ``name``; "auto" is a GPU if there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.cuda.is_available():
        allowed.append("cuda")
    if name not in allowed:
        raise ValueError(f"Training(device={name!r}): this machine has {', '.join(allowed)}; try auto.")
    return torch.device(name)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next(model.parameters()).device


def to(segment: Segment, device: torch.device) -> Segment:
    """The segment on ``device``."""
    tokens, targets = segment.tokens.to(device, non_blocking=True), segment.targets.to(device, non_blocking=True)
    return dataclasses.replace(segment, tokens=tokens, targets=targets)
