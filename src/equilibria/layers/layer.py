"""Layer and LayerOutput: the interface of every layer, and its result."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from equilibria.core.graph import refused_if_untracked
from equilibria.core.maps import Map
from equilibria.core.solve import Solution
from equilibria.core.state import State
from equilibria.fixed_point import Method


@dataclasses.dataclass(frozen=True, eq=False)
class LayerOutput:
    """The result of a layer, equilibrium or explicit."""

    output: Any
    """The part of z that later layers read; it carries the gradient."""
    z: State
    """The state, which carries the gradient."""
    f: Map
    """The map whose fixed point was sought (Stack: the last layer's), for stability measures."""
    solution: Solution | None
    """The result of the solve; None from a layer that solves nothing."""
    memory: Any = None
    """The memory for the next segment of the same streams; None from a cell that remembers nothing."""
    auxiliary: tuple[Any, ...] = ()
    """Outputs of intermediate layers for auxiliary losses (``Unrolled(auxiliary_every=…)``); empty otherwise."""

    def __post_init__(self) -> None:
        for name in ("output", "z", "auxiliary", "f"):  # memories have no graph anyway
            object.__setattr__(self, name, refused_if_untracked(getattr(self, name)))

    def __getattr__(self, name: str) -> Any:
        """Called for a name that is not there, such as a method of a tensor in ``nn.Sequential``."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"a LayerOutput has no {name!r}: it is the result of a layer, whose tensor is .output (or .z, the state); "
            f"write layer(x).output.{name}."
        )


class Layer(nn.Module, ABC):
    """A module that turns inputs into a state: an equilibrium, an explicit network, or one of your own."""

    @abstractmethod
    def forward(self, *inputs: Any, method: Method | None = None, **options: Any) -> LayerOutput:
        """The state under ``inputs``.

        Args:
            inputs: the inputs of the layer's cell; for a sequence cell x and the memory of the previous segment.
            method: the method of this call; None for the layer's own. A layer that solves nothing accepts none.
            options: options of the cell's ``prepare``.
        """

    def cache(
        self, batch: int, *, length: int | None = None, padding: Any = None, memory: Any = None, warm: bool = False
    ) -> Any:
        """A memory for generation; see ``SequenceCell.cache``. By default a TypeError: the layer keeps no past."""
        raise TypeError(
            f"{type(self).__name__} keeps no past position by position, so it has no cache for generation; use a layer "
            "around a SequenceCell, such as TransformerCell or TrellisCell."
        )


def check_no_method(layer: nn.Module, method: Method | None) -> None:
    """Raise a TypeError if a method is given to a layer that solves nothing."""
    if method is not None:
        raise TypeError(f"{type(layer).__name__} solves nothing, so it has no use for method={method}; leave it out.")
