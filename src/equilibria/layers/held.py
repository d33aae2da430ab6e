"""Held: what depends on parameters alone, kept from one position of generated text to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from equilibria.torch_private import version


class Held:
    """The cached result of a computation from a module's parameters alone, reused for every generated position.

    It is recomputed when a parameter was changed in place by an optimiser or ``load_state_dict``, replaced, cast or
    moved. Two changes that PyTorch does not count go unnoticed until ``renew``: writing through ``parameter.data``, and
    the step of an optimiser with ``fused=True``. Copies and pickles of the module start with an empty cache.
    """

    def __init__(self) -> None:
        self.renew()

    def of(self, module: nn.Module, compute: Callable[[], Any], *choices: Any) -> Any:
        """``compute()``, or its last value if parameters, autocast and ``choices`` are the same."""
        parameters = list(module.parameters())
        if any(p.is_inference() for p in parameters):  # tensors of inference mode do not count changes
            return compute()
        versions = [(id(p), version(p), p.dtype, p.device) for p in parameters]
        devices = {p.device.type for p in parameters}
        autocast = [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]
        key = (choices, versions, autocast)
        if key != self._key:
            self._key, self._value = key, compute()
            self._parameters = parameters  # kept alive, so that no other tensor can have the id of one of them
        return self._value

    def renew(self) -> None:
        """Forget the value."""
        self._key: Any = None
        self._value: Any = None
        self._parameters: list[nn.Parameter] = []

    def __deepcopy__(self, memo: Any) -> Held:
        return Held()

    def __reduce__(self) -> tuple[type[Held], tuple[()]]:
        return Held, ()
