"""The samples of a batch during a solve, stepped together or block by block.

Letters: B batch, R samples that are still evaluated, N flattened state.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.core.evaluator import Evaluator
from equilibria.core.outcome import Outcome, Residuals
from equilibria.core.progress import Progress
from equilibria.core.rounding import Rounding
from equilibria.core.solver import Iterate, Solver
from equilibria.core.state import Layout
from equilibria.core.stop import Stop
from equilibria.torch_private import is_forward_mode

BLOCK = 1 << 18
"""Numbers per thread in a block of samples: few enough that the tensors of a step stay in the cache."""
SMALL = 16
"""Only samples of at most this many numbers are cut into blocks: for them memory traffic takes longer than f."""


class Whole:
    """The samples of a batch, stepped together."""

    def __init__(
        self, z: Float[Tensor, "B N"], solver: Solver, stop: Stop, layout: Layout, evaluate: Evaluator
    ) -> None:
        self._solver, self._evaluate, self._progress = solver, evaluate, Progress(z, stop, layout)
        self.history = solver.init(z)
        self._at: Iterate | None = None
        recorded = solver.secant and (torch.is_grad_enabled() or is_forward_mode())
        self._rounding = Rounding(layout, evaluate.autocast) if recorded else None
        self.outcome = self._progress.outcome

    @property
    def moving(self) -> bool:
        """True if a sample is still active."""
        return self._progress.moving

    @property
    def converged(self) -> bool:
        """True if every sample has converged."""
        return self._progress.converged

    def update(self, z: Float[Tensor, "B N"], fz: Float[Tensor, "B N"], *, last: bool) -> None:
        """Record the pair (z, f(z)); ``last`` says that no step follows."""
        r = fz - z
        self._at = Iterate(z=z, fz=fz, r=r, active=self._progress.update(z, fz, r))
        if self._rounding is not None:
            self._rounding.update(z, fz, r)

    def drop_converged(self) -> None:
        """Drop the samples that are done from the batch, once enough of them are and if f supports it."""
        if self._progress.worth_compacting and self._evaluate.divisible:
            index, at = self._progress.still_active(), self._at
            if len(index) and at is not None:
                self._evaluate.take(index)
                self._at = Iterate(*self._progress.take(index, at.z, at.fz))
                self.history = self._solver.select(self.history, index)
                if self._rounding is not None:
                    self._rounding.take(index)

    def step(self) -> Float[Tensor, "R N"]:
        """The next iterate."""
        at, self._at = self._at, None
        assert at is not None  # ``update`` came before
        given = at if self._rounding is None else self._rounding.constant(at)
        proposal, self.history = self._solver.step(self._evaluate, given, self.history)
        proposal = self._evaluate.rounded(proposal)
        return self._progress.freeze(proposal if self._rounding is None else self._rounding.with_derivative(proposal))

    def residuals(self) -> tuple[tuple[Residuals, ...], ...]:
        """The relative residuals after each evaluation."""
        return tuple((part,) for part in self._progress.trace)


class Blocks:
    """The samples of a large batch of small states, stepped block by block."""

    def __init__(
        self, z: Float[Tensor, "B N"], solver: Solver, stop: Stop, layout: Layout, evaluate: Evaluator, size: int
    ) -> None:
        self._size = size
        self._blocks = [Whole(part, solver, stop, layout, evaluate) for part in z.split(size)]
        self.history = None
        self._next: Tensor | None = None
        self._final: tuple[Tensor, Tensor] | None = None

    @property
    def moving(self) -> bool:
        """True if a sample is still active."""
        return any(block.moving for block in self._blocks)

    def update(self, z: Float[Tensor, "B N"], fz: Float[Tensor, "B N"], *, last: bool) -> None:
        """Record the pair (z, f(z)) and, unless it is the ``last``, take the next step of each block at once."""
        self._next = None if last else torch.empty_like(z)
        for number, block in enumerate(self._blocks):
            rows = slice(number * self._size, (number + 1) * self._size)
            if block.moving:
                block.update(z[rows], fz[rows], last=last)
            if self._next is not None:
                self._next[rows] = block.step() if block.moving else z[rows]
        # Converged samples no longer move: if all have converged, the full z and f(z) are the result already.
        self._final = (z, fz) if all(block.converged for block in self._blocks) else None

    def drop_converged(self) -> None:
        """Do nothing: blocks are used only where f cannot drop samples."""

    def step(self) -> Float[Tensor, "B N"]:
        """The next iterate."""
        following, self._next = self._next, None
        assert following is not None  # ``update`` came before
        return following

    def outcome(self) -> Outcome:
        """The outcome of all samples, in their order."""
        parts = [block.outcome() for block in self._blocks]
        whole = {} if self._final is None else dict(zip(("z", "fz"), self._final, strict=True))
        names = [field.name for field in dataclasses.fields(Outcome) if field.name not in whole]
        return Outcome(**whole, **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def residuals(self) -> tuple[tuple[Residuals, ...], ...]:
        """The relative residuals after each evaluation; a block that is done has none any more."""
        rows = itertools.zip_longest(*(block.residuals() for block in self._blocks))
        starts = range(0, self._size * len(self._blocks), self._size)
        return tuple(
            tuple(dataclasses.replace(*parts, start=start) for parts, start in zip(row, starts, strict=True) if parts)
            for row in rows
        )


def batch_of(
    z: Float[Tensor, "B N"], solver: Solver, stop: Stop, layout: Layout, evaluate: Evaluator, *, may_drop: bool
) -> Whole | Blocks:
    """The batch of a solve from z: in blocks if there are many small samples that f cannot drop.

    ``may_drop=False`` keeps it whole, so that the solver's history covers all samples.
    """
    size = BLOCK * torch.get_num_threads() // max(1, z.shape[1])
    small = z.shape[1] <= SMALL and len(z) >= 2 * size > 0
    by_row = solver.by_row and z.device.type == "cpu" and not torch.is_grad_enabled()
    if may_drop and small and by_row and not evaluate.divisible:
        return Blocks(z, solver, stop, layout, evaluate, size)
    return Whole(z, solver, stop, layout, evaluate)
