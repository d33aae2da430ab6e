"""Held: what depends on parameters alone, kept from one position of generated text to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from equilibria.torch_private import is_replica, version


class _Kept(NamedTuple):
    """A value, and what it was computed from."""

    key: Any
    value: Any
    parameters: list[nn.Parameter]
    """Kept alive here, because Python could give the id of a deleted parameter to another tensor."""


class Held:
    """The cached result of a computation from a module's parameters alone, reused for every generated position.

    It is recomputed when a parameter was changed in place by an optimiser or ``load_state_dict``, replaced, cast or
    moved. Two changes that PyTorch does not count go unnoticed until ``renew``: writing through ``parameter.data``, and
    the step of an optimiser with ``fused=True``. Copies and pickles of the module start with an empty cache. Several
    threads may use one: each gets the value for its own ``choices``.
    """

    def __init__(self) -> None:
        self.renew()

    def of(self, module: nn.Module, compute: Callable[[], Any], *choices: Any) -> Any:
        """``compute()``, or its last value if parameters, autocast and ``choices`` are the same."""
        parameters = list(module.parameters())
        # Tensors of inference mode do not count changes, and a replica shares this object, but has no parameters.
        if is_replica(module) or any(p.is_inference() for p in parameters):
            return compute()
        versions = [(id(p), version(p), p.dtype, p.device) for p in parameters]
        devices = {p.device.type for p in parameters}
        autocast = [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]
        key = (choices, versions, autocast)
        kept = self._kept  # read once, since another thread may replace it
        if kept is None or kept.key != key:
            self._kept = kept = _Kept(key, compute(), parameters)
        return kept.value

    def renew(self) -> None:
        """Forget the value."""
        self._kept: _Kept | None = None

    def __deepcopy__(self, memo: Any) -> Held:
        return Held()

    def __reduce__(self) -> tuple[type[Held], tuple[()]]:
        return Held, ()
