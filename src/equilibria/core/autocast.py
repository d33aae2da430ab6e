"""Autocast: a snapshot of autocast's settings that can be entered again later."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Autocast:
    """The autocast state of one device type at the time of construction."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.enabled = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """A context with the captured state, whatever the state of the caller."""
        same_dtype = torch.get_autocast_dtype(self._device) == self.dtype
        if self.enabled == torch.is_autocast_enabled(self._device) and (same_dtype or not self.enabled):
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self.dtype, enabled=self.enabled)

    def off(self) -> contextlib.AbstractContextManager[Any]:
        """A context without autocast, for the algebra of a solver."""
        return torch.autocast(self._device, enabled=False) if self.enabled else contextlib.nullcontext()
