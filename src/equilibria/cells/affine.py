"""The simplest cell, z ↦ A z + B x + b at every position: its equilibrium is known, which docs and tests use.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.equilibrium import Cell
from equilibria.solve import select_rows


@dataclasses.dataclass(frozen=True)
class AffineShape:
    """The hyper-parameters of an ``AffineCell``."""

    width: int = 32
    """D, channels of the state and of the input."""
    norm: float = 0.5
    """‖A‖₂ at the start; below 1 the map is a contraction, by this factor a step."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"AffineShape(width={self.width}): width is at least 1.")
        if not 0 <= self.norm < math.inf:
            raise ValueError(f"AffineShape(norm={self.norm}): the norm of A is finite and ≥ 0; try 0.5.")

    @property
    def outputs(self) -> int:
        """D, channels of what the layers after read: the whole state."""
        return self.width

    def build(self) -> AffineCell:
        """The cell, with fresh parameters."""
        return AffineCell(self)


@dataclasses.dataclass(frozen=True, eq=False)
class AffineContext:
    """What is constant during a solve, with graph."""

    injection: Float[Tensor, "B T D"]
    """B x + b."""


class AffineCell(Cell):
    """z ↦ A z + B x + b, with the equilibrium (I − A)⁻¹(B x + b); positions do not meet, so there is no memory."""

    def __init__(self, shape: AffineShape) -> None:
        super().__init__()
        self.shape = shape
        a = torch.randn(shape.width, shape.width)
        self.a = nn.Parameter(a * (shape.norm / torch.linalg.matrix_norm(a, ord=2)))
        self.inject = nn.Linear(shape.width, shape.width)

    def prepare(self, x: Float[Tensor, "B T D"], memory: None) -> AffineContext:
        """B x + b."""
        return AffineContext(injection=self.inject(x))

    def start(self, context: AffineContext) -> Float[Tensor, "B T D"]:
        """Zero."""
        return torch.zeros_like(context.injection)

    def forward(self, z: Float[Tensor, "B T D"], context: AffineContext) -> Float[Tensor, "B T D"]:
        """A z + B x + b."""
        return functional.linear(z, self.a) + context.injection

    def select(self, context: AffineContext, rows: Int[Tensor, " R"]) -> AffineContext:
        """The injection of these samples."""
        return select_rows(context, rows)

    def remember(self, z: Float[Tensor, "B T D"], context: AffineContext) -> None:
        """Nothing."""
        return None

    def equilibrium(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """(I − A)⁻¹(B x + b) by a linear solve, with graph."""
        eye = torch.eye(self.shape.width, dtype=x.dtype, device=x.device)
        return torch.linalg.solve(eye - self.a, self.inject(x).mT).mT
