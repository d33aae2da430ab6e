"""What the loop knows of each sample: whether it is done, and the iterate that will be returned.

On a GPU the loop learns one iteration late that all samples are done, and evaluates f once more for nothing; done
samples stay where they are, so the results are the same, and the device never waits for the host.

Letters: B batch, R samples that are still evaluated, L leaves of the state, N flattened state, K evaluations of f.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.core.state import Layout
from equilibria.core.stop import Status, Stop
from equilibria.core.trees import take_rows

WORTH = 0.75
"""The batch is compacted when at most this fraction of it is still active."""
ROUNDING = 10
"""A sample has converged, too, when its residual is at most this many eps times its first residual."""


def row_norm(x: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Euclidean norm of each sample."""
    return torch.linalg.vector_norm(x, dim=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """Final iterate, residual, status and step count of a set of samples."""

    z: Float[Tensor, "B N"]
    fz: Float[Tensor, "B N"]
    residual: Float[Tensor, " B"]
    status: Int[Tensor, " B"]
    steps: Int[Tensor, " B"]


class Progress:
    """Applies a ``Stop`` to the pairs (z, f(z)) of a solve, sample by sample."""

    def __init__(self, z: Float[Tensor, "B N"], stop: Stop, layout: Layout) -> None:
        self._stop, self._layout = stop, layout
        self._z, self._fz = z, z.new_tensor(math.nan).expand_as(z)  # until f(z) is finite somewhere, f(z) is NaN
        self._residual = torch.full((len(z),), math.inf, dtype=z.dtype, device=z.device)
        self._status = torch.full((len(z),), int(Status.BUDGET_SPENT), device=z.device)
        self._steps, self._steps_of_all = torch.zeros(len(z), dtype=torch.long, device=z.device), 0
        self._active = torch.ones(len(z), dtype=torch.bool, device=z.device)
        self.moving, self._count = len(z) > 0, len(z)
        self._floor: Tensor | None = None
        self._samples, self._flags = torch.arange(len(z), device=z.device), _Flags(late=z.is_cuda)
        self._trace: list[tuple[Tensor, Tensor]] = []
        self._left_out: list[tuple[Tensor, Outcome]] = []

    def update(self, z: Float[Tensor, "R N"], fz: Float[Tensor, "R N"], r: Float[Tensor, "R N"]) -> Bool[Tensor, " R"]:
        """Record the new pair (z, f(z)), with r = f(z) − z; returns which samples are still active."""
        residual, size = (self._stop.norms(x.detach(), self._layout) for x in (r, fz))
        tolerance = self._tolerance(residual, size)
        if self._all_moving and not self._flags.late and self._only_better(residual, residual / size, tolerance):
            self._z, self._fz = z, fz
            return self._active
        return self._record(z, fz, residual, size, tolerance)

    def _tolerance(self, residual: Tensor, size: Tensor) -> Tensor:
        """The largest ‖r‖ that counts as converged."""
        stop = self._stop
        if not stop.has_tolerance:
            return torch.zeros_like(residual)
        if self._floor is None:
            self._floor = ROUNDING * torch.finfo(residual.dtype).eps * residual
        return torch.maximum(stop.atol + stop.rtol * size, self._floor)

    @property
    def _all_moving(self) -> bool:
        return self._count == len(self._samples)

    def _only_better(self, residual: Tensor, relative: Tensor, tolerance: Tensor) -> bool:
        """True if every sample has improved and none is done, as in most steps: then little has to be noted."""
        relative = _largest(relative)
        better = relative < self._residual if self._stop.best else torch.isfinite(relative)
        # NaN is neither better nor open, whatever the other leaves are: it is the largest of them.
        if not (better & ~_all(residual <= tolerance)).all():
            return False
        self._residual = relative
        self._trace.append((self._samples, relative))
        return True

    def _record(self, z: Tensor, fz: Tensor, residual: Tensor, size: Tensor, tolerance: Tensor) -> Tensor:
        active, stop = self._active, self._stop
        ratio = relative(residual, size)
        finite = _all(torch.isfinite(residual) & torch.isfinite(size))
        met = active & finite & _all(residual <= tolerance) & stop.has_tolerance
        first = torch.isinf(self._residual)
        improved = active & finite & ((ratio < self._residual) | met | first | (not stop.best))
        self._status = torch.where(met, int(Status.CONVERGED), self._status)
        self._status = torch.where(active & ~finite, int(Status.NONFINITE), self._status)
        self._residual = torch.where(improved, ratio, self._residual)
        self._trace.append((self._samples, torch.where(active, ratio, self._residual)))
        stale = (active & ~improved) | (self._status == Status.NONFINITE)
        self._active = active & finite & ~met
        any_stale, self._count = self._flags.read(torch.stack([stale.any().long(), self._active.sum()]))
        self.moving = self._count > 0
        # While every sample improves, as is usual, the pair is kept by reference and nothing is copied.
        if any_stale:
            rows = improved[:, None]
            self._z = torch.where(rows, z, self._z)  # one after the other, so that the old one is released
            self._fz = torch.where(rows, fz, self._fz)
        else:
            self._z, self._fz = z, fz
        return self._active

    def freeze(self, proposal: Float[Tensor, "R N"]) -> Float[Tensor, "R N"]:
        """The next iterate: samples that are done stay where they are."""
        if self._all_moving and not self._flags.late:
            self._steps_of_all += 1
            return proposal
        self._steps = self._steps + self._active
        return torch.where(self._active[:, None], proposal, self._z)

    @property
    def worth_compacting(self) -> bool:
        """True if enough samples are done for the others to continue without them."""
        return self._count <= WORTH * len(self._samples)

    def still_active(self) -> Int[Tensor, " R"]:
        """The indices of the active samples; on a GPU this waits for the device."""
        return self._active.nonzero()[:, 0]

    def take(self, index: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
        """Continue with these samples, which are all active; what is known of the others is kept."""
        done = (~self._active).nonzero()[:, 0]
        current = self._current()
        self._left_out.append((self._samples[done], take_rows(current, done)))
        kept = take_rows(current, index)
        self._z, self._fz, self._residual, self._status = kept.z, kept.fz, kept.residual, kept.status
        self._steps, self._steps_of_all = kept.steps, 0
        self._floor = None if self._floor is None else self._floor[index]
        self._samples, self._active, self._count = self._samples[index], self._active[index], len(index)
        self._flags = _Flags(late=self._flags.late)
        return self._active

    def outcome(self) -> Outcome:
        """The outcome of all samples, in their order."""
        if not self._left_out:
            return self._current()
        places, parts = zip(*self._left_out, (self._samples, self._current()), strict=True)
        order = torch.cat(places).argsort()
        names = [field.name for field in dataclasses.fields(Outcome)]
        return Outcome(**{name: torch.cat([getattr(part, name) for part in parts])[order] for name in names})

    def trace(self, residual: Float[Tensor, " B"]) -> Float[Tensor, "K B"]:
        """The relative residuals after each step; a sample that was left out repeats its last one, ``residual``."""
        if not self._left_out:
            return torch.stack([relative for _, relative in self._trace])
        return torch.stack([residual.index_copy(0, samples, relative) for samples, relative in self._trace])

    def _current(self) -> Outcome:
        return Outcome(
            z=self._z,
            fz=self._fz,
            residual=self._residual,
            status=self._status,
            steps=self._steps + self._steps_of_all,
        )


def relative(norm: Tensor, size: Tensor) -> Float[Tensor, " R"]:
    """norm / size of each row, or the largest of its leaves; 0 where the norm is 0, whatever the size."""
    return _largest(torch.where(norm == 0, 0.0, norm / size))


def _largest(x: Tensor) -> Float[Tensor, " R"]:
    """One number per sample of one per leaf."""
    return x if x.ndim == 1 else x.amax(dim=1)


def _all(flags: Tensor) -> Bool[Tensor, " R"]:
    """True for a sample if it is true for all of its leaves."""
    return flags if flags.ndim == 1 else flags.all(dim=1)


class _Flags:
    """Reads flags of the device; ``late`` reads those of the call before, while the device computes on."""

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self._before: tuple[Tensor, torch.cuda.Event | None] | None = None

    def read(self, flags: Int[Tensor, " 2"]) -> list[int]:
        """Whether a copy is needed, and the number of active samples.

        Late: always says that a copy is needed, which is safe, and gives the count of the previous call; the first
        call gives ``sys.maxsize``.
        """
        if not self.late:
            return flags.tolist()
        event = None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            flags = host
        before, self._before = self._before, (flags, event)
        if before is None:
            return [1, sys.maxsize]
        if before[1] is not None:
            before[1].synchronize()
        return [1, int(before[0][1])]
