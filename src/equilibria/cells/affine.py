"""The simplest cell, z ↦ A z + B x + b on the last axis, with a known equilibrium, for docs and tests.

Letters: B batch, D width.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from equilibria.checks import check_at_least, check_fields
from equilibria.layers.cell import Cell, Prepared


@dataclasses.dataclass(frozen=True)
class AffineConfig:
    """The hyper-parameters of an ``AffineCell``."""

    width: int = 32
    """D, channels of the state and of the input."""
    norm: float = 0.5
    """‖A‖₂ at the start; below 1 the map is a contraction, by this factor per step."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, width=1, norm=0)

    @property
    def outputs(self) -> int:
        """D, the number of channels that later layers read: the whole state."""
        return self.width

    def build(self) -> AffineCell:
        """The cell, with fresh parameters."""
        return AffineCell(self)


class AffineCell(Cell):
    """z ↦ A z + B x + b on the last axis, with the equilibrium (I − A)⁻¹(B x + b); positions do not interact."""

    def __init__(self, config: AffineConfig) -> None:
        super().__init__()
        self.config = config
        self.a = nn.Parameter(torch.empty(config.width, config.width))
        self.reset_parameters()
        self.inject = nn.Linear(config.width, config.width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A again; the injection draws its own parameters."""
        a = torch.randn(self.a.shape, dtype=self.a.dtype, device=self.a.device)
        self.a.copy_(a * (self.config.norm / torch.linalg.matrix_norm(a, ord=2)))

    def prepare(self, x: Float[Tensor, "B *rest D"]) -> Prepared:
        """Rows: B x + b."""
        return Prepared(rows=self.inject(x))

    def start(self, prepared: Prepared) -> Float[Tensor, "B *rest D"]:
        """Zero."""
        return torch.zeros_like(prepared.rows)

    def forward(self, z: Float[Tensor, "B *rest D"], prepared: Prepared) -> Float[Tensor, "B *rest D"]:
        """A z + B x + b."""
        return functional.linear(z, self.a) + prepared.rows

    def equilibrium(self, x: Float[Tensor, "B *rest D"]) -> Float[Tensor, "B *rest D"]:
        """(I − A)⁻¹(B x + b) by a linear solve, with graph."""
        eye = torch.eye(self.config.width, dtype=x.dtype, device=x.device)
        return torch.linalg.solve(eye - self.a, self.inject(x)[..., None])[..., 0]
