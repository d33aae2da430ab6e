"""The hyper-parameters of a ``TrellisCell``."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from equilibria.cells.masks import check_rate
from equilibria.cells.weight_norm import INITS, Init

if TYPE_CHECKING:
    from equilibria.cells.trellis import TrellisCell

Recurrence = Literal["delayed", "scan"]
_CHOICES = {"recurrence": ("delayed", "scan"), "injection_init": INITS}


@dataclasses.dataclass(frozen=True)
class TrellisShape:
    """The hyper-parameters of a ``TrellisCell``: kernels of two times, without dilation, as in all its language models.

    The state has 2·(hidden + outputs) channels: as many of h as of c.
    """

    width: int = 400
    """E, channels of the input."""
    hidden: int = 1000
    """Channels of h that stay inside the cell."""
    outputs: int = 400
    """O, channels of h, the last ones, that the layers after read."""
    dropout: float = 0.0
    """Share of the channels of h that is dropped inside the cell: the same at all times and in all iterations."""
    weight_dropout: float = 0.0
    """Share of the weights of the past, W⁰ and X⁰, that is dropped in a step (DropConnect)."""
    weight_norm: bool = True
    """Whether the two matrices are weight-normed."""
    carry_input: bool = True
    """Whether a segment sees the last input of the one before, as it does its state; TrellisNet's code reads 0."""
    recurrence: Recurrence = "delayed"
    """The c_{t−1} of c_t: that of the iterate ("delayed", TrellisNet), or that of the same evaluation ("scan")."""
    std: float = 0.01
    """The weights of h and the bias start from N(0, std²)."""
    injection_init: Init = "default_fan_in"
    """The weights of the input start from U(±1/√(2·width)), or with "normal" from N(0, std²), as in TrellisNet."""

    def __post_init__(self) -> None:
        for name, low in (("width", 1), ("hidden", 0), ("outputs", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"TrellisShape({name}={getattr(self, name)}): {name} is at least {low}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"TrellisShape({name}={getattr(self, name)!r}): {name} is {choices}.")
        if not 0 <= self.std < math.inf:
            raise ValueError(f"TrellisShape(std={self.std}): a standard deviation is finite and ≥ 0; try 0.01.")
        check_rate("TrellisShape", "dropout", self.dropout)
        check_rate("TrellisShape", "weight_dropout", self.weight_dropout)

    @property
    def channels(self) -> int:
        """H = hidden + outputs, channels of h, and of c."""
        return self.hidden + self.outputs

    def build(self) -> TrellisCell:
        """The cell, with fresh parameters."""
        from equilibria.cells.trellis import TrellisCell  # which imports its shape

        return TrellisCell(self)
