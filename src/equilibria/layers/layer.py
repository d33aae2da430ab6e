"""Layer and LayerOutput: what every layer of states is called with, and what it gives back."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from equilibria.core.maps import Map
from equilibria.core.solve import Solution
from equilibria.core.state import State
from equilibria.fixed_point import Method


@dataclasses.dataclass(frozen=True, eq=False)
class LayerOutput:
    """What a layer gives back, equilibrium or explicit."""

    output: Any
    """What the layers after this one read of z; it carries the gradient."""
    z: State
    """The state, which carries the gradient."""
    f: Map
    """The map whose fixed point was sought (Stack: the last layer's), for stability measures."""
    solution: Solution | None
    """How the solve went; None from a layer that solves nothing."""
    memory: Any = None
    """For the next segment of the same streams; None from a cell that remembers nothing."""
    auxiliary: tuple[Any, ...] = ()
    """The outputs of layers in between, for auxiliary losses, from an explicit network that was asked for them."""


class Layer(nn.Module, ABC):
    """A module that turns inputs into a state: an equilibrium, an explicit network, or one of your own."""

    @abstractmethod
    def forward(self, *inputs: Any, method: Method | None = None, **options: Any) -> LayerOutput:
        """The state under ``inputs``.

        Args:
            inputs: as the layer's cell takes them; of a sequence layer x and the memory of the segment before.
            method: how to solve this time; None for the layer's own way. A layer that solves nothing has none.
            options: those of the cell's ``prepare``.
        """

    def cache(
        self, batch: int, *, length: int | None = None, padding: Any = None, memory: Any = None, warm: bool = False
    ) -> Any:
        """A memory for generation; here a TypeError, since this layer keeps no past. See ``SequenceCell.cache``."""
        raise TypeError(
            f"{type(self).__name__} keeps no past position by position, so it has no cache for generation; use a layer "
            "around a SequenceCell, such as TransformerCell or TrellisCell."
        )


def check_no_method(layer: nn.Module, method: Method | None) -> None:
    """Raise a TypeError if a method is given to a layer that solves nothing."""
    if method is not None:
        raise TypeError(f"{type(layer).__name__} solves nothing, so it has no use for method={method}; leave it out.")
