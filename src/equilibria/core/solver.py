"""Solver: what proposes the next iterate of a solve, and the point from which it does.

Letters: B batch, N flattened state. State ``z``, map ``f``, residual ``r``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.core.evaluator import Evaluator
from equilibria.core.trees import take_rows

History = Any
"""What a solver remembers from one step to the next; each solver has a type of its own for it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Iterate:
    """The point from which a solver takes its next step."""

    z: Float[Tensor, "B N"]
    fz: Float[Tensor, "B N"]
    """f(z)."""
    r: Float[Tensor, "B N"]
    """The residual f(z) − z."""
    active: Bool[Tensor, " B"]
    """False for the samples that are done: a step does not move them."""


class Solver(ABC):
    """Proposes the next iterate, and nothing else. Subclasses are frozen dataclasses of hyper-parameters."""

    cost: ClassVar[int] = 1
    """Fewest evaluations that one step and the test of its result take."""
    by_row: ClassVar[bool] = False
    """A step treats every row by itself and does not evaluate f: then a large batch can be stepped part by part."""

    @abstractmethod
    def init(self, z: Float[Tensor, "B N"]) -> History:
        """The history before the first step."""

    @abstractmethod
    def step(self, f: Evaluator, at: Iterate, history: History) -> tuple[Float[Tensor, "B N"], History]:
        """The next iterate and the new history. Every further evaluation of f is counted."""

    def select(self, history: History, rows: Int[Tensor, " R"]) -> History:
        """The history of these samples alone, in ascending order; here of tensors with the batch as first axis."""
        return take_rows(history, rows)
