"""Solver: proposes the next iterate of a solve, given an ``Iterate``; and the settings of a solve.

Letters: B batch, N flattened state. State ``z``, map ``f``, residual ``r``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.core.evaluator import Evaluator
from equilibria.core.stop import OnFailure, Stop
from equilibria.core.trees import take_rows

History = Any
"""The data that a solver carries from one step to the next; each solver has its own type."""


@dataclasses.dataclass(frozen=True, eq=False)
class Iterate:
    """The point from which a solver takes its next step."""

    z: Float[Tensor, "B N"]
    fz: Float[Tensor, "B N"]
    """f(z)."""
    r: Float[Tensor, "B N"]
    """The residual f(z) − z."""
    active: Bool[Tensor, " B"]
    """False for the samples that are done, which a step does not move."""


class Solver(ABC):
    """Proposes the next iterate, and nothing else. Subclasses are frozen dataclasses of hyper-parameters."""

    cost: ClassVar[int] = 1
    """Least number of evaluations for one step and the test of its result."""
    by_row: ClassVar[bool] = False
    """True if a step treats every row by itself and does not evaluate f: then a batch can be stepped in blocks."""
    secant: ClassVar[bool] = False
    """True if the weights of a step are quotients of differences between residuals. They are meaningless once these
    are rounding errors, so that a recorded solve then passes no derivative through the step (see ``Rounding``)."""
    plain: ClassVar[bool] = False
    """True if a step is a fixed combination of iterates and values of f, so that its derivative is right at any
    residual, however small."""

    @abstractmethod
    def init(self, z: Float[Tensor, "B N"]) -> History:
        """The history before the first step."""

    @abstractmethod
    def step(self, f: Evaluator, at: Iterate, history: History) -> tuple[Float[Tensor, "B N"], History]:
        """The next iterate and the new history. Each call of ``f`` counts as an evaluation."""

    def select(self, history: History, rows: Int[Tensor, " R"]) -> History:
        """The history of these samples alone, in ascending order. The default suits any tree of batch-first tensors."""
        return take_rows(history, rows)


@runtime_checkable
class ForwardSolve(Protocol):
    """The fields of a ``Method`` that a rule reads: settings of the forward solve, and the reaction to a failure."""

    @property
    def solver(self) -> Solver:
        """Proposes the iterates."""
        ...

    @property
    def stop(self) -> Stop:
        """Tolerances and budget."""
        ...

    @property
    def coupled(self) -> bool:
        """True if f mixes the samples, so that the whole state is one problem."""
        ...

    @property
    def on_failure(self) -> OnFailure:
        """The reaction to a forward or backward solve that does not converge."""
        ...

    @property
    def keep(self) -> tuple[int, ...]:
        """Numbers of steps after which the solve stores its state in ``Solution.iterates``."""
        ...

    @property
    def keep_point(self) -> bool:
        """True if ``Solution.point`` is kept."""
        ...
