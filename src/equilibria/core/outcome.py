"""The record of a solve: the residuals after each evaluation, and the outcome of each sample.

Letters: B batch, R samples that are still evaluated, N flattened state.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Residuals:
    """The relative residuals of some samples of a batch after one evaluation."""

    values: Float[Tensor, " R"]
    places: Int[Tensor, " R"] | None = None
    """Where the samples are in their block; None for a whole block."""
    start: int = 0
    """Where the block begins in the batch."""

    def put_into(self, row: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The row of all samples with these values, a copy unless they are all of it."""
        if len(self.values) == len(row):
            return self.values
        places = torch.arange(len(self.values), device=row.device) if self.places is None else self.places
        return row.index_copy(0, self.start + places, self.values)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """Final iterate, residual, status and step count of a set of samples."""

    z: Float[Tensor, "B N"]
    fz: Float[Tensor, "B N"]
    residual: Float[Tensor, " B"]
    status: Int[Tensor, " B"]
    steps: Int[Tensor, " B"]
