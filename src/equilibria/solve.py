"""The only loop of the library: iterate a solver until every sample has reached its fixed point.

Letters: B batch, N flattened state, K evaluations of f. State ``z``, map ``f``, Jacobian ``J``.
"""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.judge import Judge
from equilibria.maps import (
    AffineMap,
    Autocast,
    CompilableMap,
    DifferentiableMap,
    Evaluator,
    Map,
    SelectableMap,
    algebra_dtype,
    map_tensors,
    row_norm,
    select_rows,
)
from equilibria.stop import Status, Stop, check_kind

__all__ = [
    "AffineMap",
    "Autocast",
    "CompilableMap",
    "DifferentiableMap",
    "Evaluator",
    "History",
    "Map",
    "SelectableMap",
    "Solution",
    "Solver",
    "Status",
    "Stop",
    "algebra_dtype",
    "check_kind",
    "map_tensors",
    "row_norm",
    "select_rows",
    "solve",
]

History = Any
"""What a solver remembers from one step to the next: its own choice of value."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """What a solve gives back. Per-sample fields have the batch as first axis."""

    z: Float[Tensor, "B *state"]
    """The solution; from a gradient rule it is the differentiable one."""
    fz: Float[Tensor, "B *state"]
    """f at the iterate that the loop returned; it may share its memory with z."""
    residual: Float[Tensor, " B"]
    """‖f(z) − z‖ / ‖f(z)‖ at the iterate that was returned."""
    status: Int[Tensor, " B"]
    """A ``Status`` a sample."""
    steps: Int[Tensor, " B"]
    """Steps that each sample took before it was done."""
    evals: int
    """Evaluations of f, Jacobian–vector products included; a gradient rule adds those that carry its graph."""
    trace: Float[Tensor, "K B"]
    """Relative residual after each step, as long as the solve was; a sample that is done repeats its last value."""
    history: History = None
    """What the solver remembers at the end (Shine reads Broyden's inverse from it); of f that is a ``SelectableMap``,
    of the samples alone that the solve ended with."""
    adjoint: list[Solution] = dataclasses.field(default_factory=list)
    """Each backward pass appends the solution of its own solve."""

    @property
    def converged(self) -> Bool[Tensor, " B"]:
        """True for the samples that met the tolerance."""
        return self.status == Status.CONVERGED

    def __str__(self) -> str:
        """Counts, cost, worst residual, and the advice of the worst status."""
        total, done = self.status.numel(), int(self.converged.sum())
        worst = Status(int(self.status.max()))
        line = (
            f"{done} of {total} samples converged, {self.evals} evaluations, worst residual {self.residual.max():.1e}"
        )
        return line if worst is Status.CONVERGED else f"{line}. {worst.name}: {worst.advice}"

    __repr__ = __str__


class Solver(ABC):
    """Proposes the next iterate, and nothing else. Subclasses are frozen dataclasses of hyper-parameters."""

    cost: ClassVar[int] = 1
    """Fewest evaluations that one step and the test of its result take."""

    @abstractmethod
    def init(self, z: Float[Tensor, "B N"]) -> History:
        """The history before the first step."""

    @abstractmethod
    def step(
        self, f: Evaluator, z: Float[Tensor, "B N"], fz: Float[Tensor, "B N"], history: History
    ) -> tuple[Float[Tensor, "B N"], History]:
        """The next iterate and the new history, from z and fz = f(z). More evaluations of f are counted.

        ``f.gap`` is fz − z, which nobody has to compute again.
        """

    def select(self, history: History, rows: Int[Tensor, " R"]) -> History:
        """The history of these samples alone, in ascending order; here of tensors with the batch as first axis."""
        return select_rows(history, rows)


def solve(f: Map, z0: Float[Tensor, "B *state"], solver: Solver, stop: Stop) -> Solution:
    """The fixed point z = f(z) of each sample, found by ``solver`` from ``z0``; no gradient rule.

    Every sample is its own problem: it has its own residual, status and step count, is never moved again once it is
    done, and gets the same answer alone as in any batch. Operations are recorded by autograd if gradients are enabled,
    as anywhere in PyTorch; call it under ``torch.no_grad()``, or through a gradient rule, to avoid that.

    Args:
        f: the map, ``[B *state] -> [B *state]``; it must treat samples independently and give the same bits when
            called twice. Of a ``SelectableMap`` samples that are done are not evaluated any more, once they are enough
            to be left out.
        z0: the start, finite, with the batch as first axis.
        solver: proposes the iterates.
        stop: tolerances and budget.

    Warns:
        RuntimeWarning: f computes in half precision, and the tolerance is below what that resolves.

    Raises:
        ValueError, TypeError: z0 has no batch axis, is empty or not finite; f changes shape, dtype or device.
    """
    check_kind("solver", solver, Solver, "Anderson()")
    check_kind("stop", stop, Stop, "Stop(rtol=1e-3)")
    evaluate = Evaluator(f, z0, stop.max_evals)
    _warn_of_rounding(evaluate.computes_in, stop)
    z = z0.reshape(len(z0), -1).to(evaluate.algebra)
    del z0  # a state that would be kept for nothing
    with evaluate.autocast.off():
        history, judge = solver.init(z), Judge(z, stop)
        while True:
            fz = evaluate(z)
            evaluate.gap = fz - z
            evaluate.active = judge.update(z, fz, evaluate.gap)
            if not judge.moving or evaluate.remaining < solver.cost:
                break
            rows = judge.worth_selecting() if evaluate.selectable else None
            if rows is not None:
                evaluate.select(rows)
                judge.select(rows)
                z, fz, evaluate.gap = z[rows], fz[rows], evaluate.gap[rows]
                history = solver.select(history, rows)
            proposal, history = solver.step(evaluate, z, fz, history)
            z = judge.freeze(evaluate.rounded(proposal))
            evaluate.gap = z.new_empty(0)  # states that nobody needs while f is evaluated
            del proposal, fz
    found = judge.verdict()
    return Solution(
        z=evaluate.shaped(found.z),
        fz=evaluate.shaped(found.fz),
        residual=found.residual,
        status=found.status,
        steps=found.steps,
        evals=evaluate.evals,
        trace=judge.trace(found.residual),
        history=history,
    )


def _warn_of_rounding(dtype: torch.dtype, stop: Stop) -> None:
    level = torch.finfo(dtype).eps / 2
    if dtype in (torch.bfloat16, torch.float16) and 0 < stop.rtol < level:
        warnings.warn(
            f"Stop(rtol={stop.rtol:g}) is below what {str(dtype)[6:]} resolves: residuals of an f that computes in it "
            f"stay at about {level:.0e}, so solves will spend their budget; give rtol={4 * level:.0e}, or let f "
            "compute in float32.",
            RuntimeWarning,
            stacklevel=3,
        )
