"""The only loop of the library: iterate a solver until every sample has reached its fixed point.

Letters: B batch, R samples that are still evaluated, N flattened state, K evaluations of f. State ``z``, map ``f``,
residual ``r``.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.core.checks import check_kind
from equilibria.core.evaluator import Evaluator
from equilibria.core.heap import keep_freed_memory
from equilibria.core.maps import Map, as_map
from equilibria.core.progress import Outcome, Progress
from equilibria.core.solver import History, Iterate, Solver
from equilibria.core.state import Layout, State, check_finite
from equilibria.core.stop import Status, Stop
from equilibria.core.tracing import check_not_exported, untraced

keep_freed_memory()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """The result of a solve. Per-sample fields have the batch as first axis."""

    z: State
    """The solution; differentiable if it comes from a gradient rule."""
    fz: State
    """f at the iterate that the loop returned; it may share its memory with z."""
    residual: Float[Tensor, " B"]
    """‖f(z) − z‖ / ‖f(z)‖ at the iterate that was returned."""
    status: Int[Tensor, " B"]
    """One ``Status`` per sample."""
    steps: Int[Tensor, " B"]
    """Number of steps that each sample took before it was done."""
    evals: int
    """Number of evaluations of f (NFE), J·v products included; a gradient rule adds its evaluations with graph."""
    residuals: tuple[tuple[Tensor, ...], ...]
    """The rows of ``trace``, each in one or more parts, which ``trace`` concatenates."""
    history: History = None
    """The solver's last history (Shine reads Broyden's inverse from it). If samples were dropped during the solve, it
    covers only those still active at the end."""
    iterates: tuple[State, ...] = ()
    """The states after the numbers of steps in ``keep``; only ``Unroll`` gives them a gradient."""
    adjoint: list[Solution] = dataclasses.field(default_factory=lambda: Adjoints())
    """Each backward pass appends the solution of its adjoint solve; ``dataclasses.replace`` shares the list."""
    point: State | None = None
    """z*, the iterate that the loop returned, without graph, if a gradient rule has replaced z by f(z*) and
    ``Method(keep_point=True)`` asked for it; else None."""

    @property
    def converged(self) -> Bool[Tensor, " B"]:
        """True for the samples that met the tolerance."""
        return self.status == Status.CONVERGED

    @property
    def trace(self) -> Float[Tensor, "K B"]:
        """Relative residual after each evaluation; a sample that is done repeats its last value."""
        return torch.stack([parts[0] if len(parts) == 1 else torch.cat(parts) for parts in self.residuals])

    def __str__(self) -> str:
        """Counts, cost, worst residual, and the advice of the worst status."""
        total, done = self.status.numel(), int(self.converged.sum())
        if total == 0:
            return "no samples, nothing to solve"
        worst = Status(int(self.status.max()))
        line = (
            f"{done} of {total} samples converged, {self.evals} evaluations, worst residual {self.residual.max():.1e}"
        )
        return line if worst is Status.CONVERGED else f"{line}. {worst.name}: {worst.advice}"

    __repr__ = __str__


class Adjoints(list[Solution]):
    """The adjoint solutions of a fixed point, in the order of the backward passes."""

    def __getitem__(self, index: Any) -> Any:
        if not self and not isinstance(index, slice):
            raise IndexError("Solution.adjoint is empty: each backward pass through Implicit() or Neumann() adds one.")
        return super().__getitem__(index)


@untraced
def solve(
    f: Map | Callable[[State], State],
    z0: State,
    solver: Solver,
    stop: Stop,
    *,
    coupled: bool = False,
    keep: Sequence[int] = (),
    drop_converged: bool = True,
) -> Solution:
    """The fixed point z = f(z) of each sample, found by ``solver`` from ``z0``, without a gradient rule.

    Unless ``coupled``, every sample is its own problem: it has its own residual, status and step count, is never moved
    again once it is done, and gets the same answer alone as in any batch. Autograd records all steps if gradients are
    enabled, as anywhere in PyTorch; to avoid that, call it under ``torch.no_grad()`` or through a gradient rule.

    Args:
        f: the map; it must give the same bits when called twice, and treat samples independently unless ``coupled``.
        z0: the start, finite: a tensor ``[B *shape]`` or a tree of such tensors.
        solver: proposes the iterates.
        stop: tolerances and budget.
        coupled: f mixes the samples, so that the whole state is one problem: one residual, status and step count, in
            fields of length 1. No part is frozen before the whole is done, and the leaves of z0 may have any shape.
        keep: numbers of steps after which the state is stored in ``Solution.iterates``; a sample that was done before
            has its last state there.
        drop_converged: if f supports it (``Map.rows``), converged samples leave the batch once at least a quarter of
            it has converged. False keeps all of them, so that the history covers the whole batch; so does ``keep``.

    Warns:
        RuntimeWarning: f computes in half precision, and the tolerance is below its rounding.

    Raises:
        ValueError, TypeError: z0 has no batch axis, is empty or not finite; f changes structure, shape, dtype or
            device.
    """
    check_not_exported()
    check_kind("solver", solver, Solver, "Anderson()")
    check_kind("stop", stop, Stop, "Stop(rtol=1e-3)")
    check_keep(keep)
    layout = Layout.of(z0, coupled=coupled)
    check_finite(z0, coupled=coupled)
    evaluate = Evaluator(as_map(f), layout, stop.max_evals)
    _warn_of_rounding(evaluate.computes_in, stop)
    z = layout.pack(z0)
    del z0  # it would stay in memory during the solve
    with evaluate.autocast.off():
        parts = z, solver, stop, layout, evaluate
        block = rows_per_block(z, solver, evaluate) if drop_converged else len(z)
        batch = Blocks(*parts, block) if block < len(z) else Whole(*parts)
        may_drop, kept, step = drop_converged and not keep, [], 0
        while True:
            fz = evaluate(z)
            last = evaluate.remaining < solver.cost
            batch.update(z, fz, last=last)
            if last or not batch.moving:
                break
            del z, fz  # free both states before f is evaluated again
            if may_drop:
                batch.drop_converged()
            z = batch.step()
            step += 1
            if step in keep:
                kept.append(layout.unpack(z))
    found = batch.outcome()
    return Solution(
        z=layout.unpack(found.z),
        fz=layout.unpack(found.fz),
        residual=found.residual,
        status=found.status,
        steps=found.steps,
        evals=evaluate.evals,
        residuals=batch.residuals(found.residual),
        history=batch.history,
        iterates=(*kept, *[layout.unpack(found.z)] * (len(keep) - len(kept))),
    )


def check_keep(keep: Sequence[int]) -> None:
    """Raise a ValueError unless these are increasing numbers of steps."""
    increasing = all(a < b for a, b in itertools.pairwise(keep))
    if not increasing or any(not isinstance(step, int) or step < 1 for step in keep):
        raise ValueError(f"keep={tuple(keep)}: these must be increasing numbers of steps from 1 on; try keep=(5, 10).")


def _warn_of_rounding(dtypes: tuple[torch.dtype, ...], stop: Stop) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        level = torch.finfo(dtype).eps / 2
        # Beside wider leaves a half-precision leaf may be small, so only a state of one dtype is warned about.
        if set(dtypes) == {dtype} and 0 < stop.rtol < level:
            warnings.warn(
                f"Stop(rtol={stop.rtol:g}) is below what {str(dtype)[6:]} resolves: residuals of an f that computes in "
                f"it stay at about {level:.0e}, so solves will spend their budget; give rtol={4 * level:.0e}, or let f "
                "compute in float32.",
                RuntimeWarning,
                stacklevel=3,
            )


BLOCK = 1 << 18
"""Numbers per thread in a block of samples: few enough that the tensors of a step stay in the cache."""


def rows_per_block(z: Float[Tensor, "B N"], solver: Solver, evaluate: Evaluator) -> int:
    """Number of samples stepped together: all, unless they are many and small and f cannot drop samples."""
    if not solver.by_row or z.shape[1] > SMALL or z.device.type != "cpu" or torch.is_grad_enabled():
        return len(z)
    block = BLOCK * torch.get_num_threads() // z.shape[1]
    return len(z) if len(z) < 2 * block or evaluate.divisible else block


SMALL = 16
"""A sample of at most this many numbers is small: a step then spends more time on memory traffic than on f."""


class Whole:
    """The samples of a batch, stepped together."""

    def __init__(
        self, z: Float[Tensor, "B N"], solver: Solver, stop: Stop, layout: Layout, evaluate: Evaluator
    ) -> None:
        self._solver, self._evaluate, self._progress = solver, evaluate, Progress(z, stop, layout)
        self.history = solver.init(z)
        self._at: Iterate | None = None
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

    def drop_converged(self) -> None:
        """Drop the samples that are done from the batch, once enough of them are and if f supports it."""
        if self._progress.worth_compacting and self._evaluate.divisible:
            index, at = self._progress.still_active(), self._at
            if len(index) and at is not None:
                self._evaluate.take(index)
                active = self._progress.take(index)
                self._at = Iterate(z=at.z[index], fz=at.fz[index], r=at.r[index], active=active)
                self.history = self._solver.select(self.history, index)

    def step(self) -> Float[Tensor, "R N"]:
        """The next iterate."""
        at, self._at = self._at, None
        assert at is not None  # ``update`` came before
        proposal, self.history = self._solver.step(self._evaluate, at, self.history)
        return self._progress.freeze(self._evaluate.rounded(proposal))

    def residuals(self, final: Float[Tensor, " B"]) -> tuple[tuple[Tensor, ...], ...]:
        """The relative residuals after each evaluation; a dropped sample repeats its ``final`` one."""
        return tuple((row,) for row in self._progress.trace(final))


class Blocks:
    """The samples of a large batch of small states, stepped block by block."""

    def __init__(
        self, z: Float[Tensor, "B N"], solver: Solver, stop: Stop, layout: Layout, evaluate: Evaluator, block: int
    ) -> None:
        self._rows = [slice(start, start + block) for start in range(0, len(z), block)]
        self._blocks = [Whole(z[rows], solver, stop, layout, evaluate) for rows in self._rows]
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
        for rows, block in zip(self._rows, self._blocks, strict=True):
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

    def residuals(self, final: Float[Tensor, " B"]) -> tuple[tuple[Tensor, ...], ...]:
        """The relative residuals after each evaluation, block by block; a block that is done repeats its final ones."""
        ends = [final[rows] for rows in self._rows]
        parts = [block.residuals(end) for block, end in zip(self._blocks, ends, strict=True)]
        length = max(map(len, parts))
        padded = [part + ((end,),) * (length - len(part)) for part, end in zip(parts, ends, strict=True)]
        return tuple(tuple(row for (row,) in rows) for rows in zip(*padded, strict=True))
