"""What the loop knows of each sample: whether it is done, and the iterate that will be returned.

On a GPU it learns one iteration late that all are done, and evaluates f once more for nothing; done samples stay where
they are, so the results are the same, and the device never waits for the host.

Letters: B batch, R samples that the solve goes on with, N flattened state, K evaluations of f.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.maps import row_norm, select_rows
from equilibria.stop import Status, Stop

WORTH = 0.75
"""Samples that are done are left out once no more than this share of those evaluated still moves."""


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """Of some samples: what is returned, and how their solves ended."""

    z: Float[Tensor, "B N"]
    fz: Float[Tensor, "B N"]
    residual: Float[Tensor, " B"]
    status: Int[Tensor, " B"]
    steps: Int[Tensor, " B"]


class _Now:
    """Reads flags at once."""

    late = False

    def read(self, flags: Int[Tensor, " 2"]) -> list[int]:
        """The flags."""
        return flags.tolist()


class _Late:
    """Reads flags one call late, so that a device computes on while the host waits for those of the call before."""

    late = True

    def __init__(self) -> None:
        self._before: tuple[Tensor, torch.cuda.Event | None] | None = None

    def read(self, flags: Int[Tensor, " 2"]) -> list[int]:
        """That a copy is needed, which is always safe, and the number of the call before; at first, one too high."""
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


def _flags_of(device: torch.device) -> _Now | _Late:
    return _Late() if device.type == "cuda" else _Now()


class Judge:
    """Applies a ``Stop`` to the pairs (z, f(z)) of a solve, sample by sample."""

    def __init__(self, z: Float[Tensor, "B N"], stop: Stop) -> None:
        self._stop = stop
        self._z, self._fz = z, z.new_tensor(math.nan).expand_as(z)  # until f(z) is finite somewhere, f(z) is NaN
        self._residual = torch.full((len(z),), math.inf, dtype=z.dtype, device=z.device)
        self._status = torch.full((len(z),), int(Status.BUDGET_SPENT), device=z.device)
        self._steps, self._steps_of_all = torch.zeros(len(z), dtype=torch.long, device=z.device), 0
        self._active = torch.ones(len(z), dtype=torch.bool, device=z.device)
        self.moving, self._count = True, len(z)
        self._rows, self._flags = torch.arange(len(z), device=z.device), _flags_of(z.device)
        self._trace: list[tuple[Tensor, Tensor]] = []
        self._left_out: list[tuple[Tensor, Verdict]] = []

    def update(self, z: Float[Tensor, "R N"], fz: Float[Tensor, "R N"], g: Float[Tensor, "R N"]) -> Bool[Tensor, " R"]:
        """Judge the new pair (z, f(z)), with g = f(z) − z; returns which samples go on."""
        stop = self._stop
        gap, size = row_norm(g.detach()), row_norm(fz.detach())
        tolerance = stop.atol + stop.rtol * size
        if self._all_moving and not self._flags.late and self._only_better(gap, gap / size, tolerance):
            self._z, self._fz = z, fz
            return self._active
        return self._judge(z, fz, gap, size, tolerance)

    @property
    def _all_moving(self) -> bool:
        return self._count == len(self._rows)

    def _only_better(self, gap: Tensor, relative: Tensor, tolerance: Tensor) -> bool:
        """Whether every sample has improved and none is done, as in most steps: then little has to be noted."""
        better = relative < self._residual if self._stop.best else torch.isfinite(relative)
        if not (better & (gap > tolerance)).all():  # NaN is neither
            return False
        self._residual = relative
        self._trace.append((self._rows, relative))
        return True

    def _judge(self, z: Tensor, fz: Tensor, gap: Tensor, size: Tensor, tolerance: Tensor) -> Tensor:
        active, stop = self._active, self._stop
        relative = torch.where(gap == 0, 0.0, gap / size)
        finite = torch.isfinite(gap) & torch.isfinite(size)
        met = active & finite & (gap <= tolerance) & stop.has_tolerance
        first = torch.isinf(self._residual)
        improved = active & finite & ((relative < self._residual) | met | first | (not stop.best))
        self._status = torch.where(met, int(Status.CONVERGED), self._status)
        self._status = torch.where(active & ~finite, int(Status.NONFINITE), self._status)
        self._residual = torch.where(improved, relative, self._residual)
        self._trace.append((self._rows, torch.where(active, relative, self._residual)))
        stale = (active & ~improved) | (self._status == Status.NONFINITE)
        self._active = active & finite & ~met
        any_stale, self._count = self._flags.read(torch.stack([stale.any().long(), self._active.sum()]))
        self.moving = self._count > 0
        # While every sample improves, as is usual, the pair is kept by reference and nothing is copied.
        if any_stale:
            rows = improved[:, None]
            self._z = torch.where(rows, z, self._z)  # one after the other, so that the old one is let go
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

    def worth_selecting(self) -> Int[Tensor, " R"] | None:
        """The samples that move, if they are few enough to go on without the others."""
        if self._count > WORTH * len(self._rows):
            return None
        rows = self._active.nonzero()[:, 0]
        return rows if len(rows) else None

    def select(self, rows: Int[Tensor, " R"]) -> None:
        """Goes on with these samples, which all move; what is known of the others is kept."""
        done = (~self._active).nonzero()[:, 0]
        current = self._current()
        self._left_out.append((self._rows[done], select_rows(current, done)))
        going = select_rows(current, rows)
        self._z, self._fz, self._residual, self._status = going.z, going.fz, going.residual, going.status
        self._steps, self._steps_of_all = going.steps, 0
        self._rows, self._active, self._count = self._rows[rows], self._active[rows], len(rows)
        self._flags = _flags_of(rows.device)

    def verdict(self) -> Verdict:
        """Of all samples, in their order."""
        if not self._left_out:
            return self._current()
        places, parts = zip(*self._left_out, (self._rows, self._current()), strict=True)
        order = torch.cat(places).argsort()
        names = [field.name for field in dataclasses.fields(Verdict)]
        return Verdict(**{name: torch.cat([getattr(part, name) for part in parts])[order] for name in names})

    def trace(self, residual: Float[Tensor, " B"]) -> Float[Tensor, "K B"]:
        """The relative residuals after each step; a sample that was left out repeats its last one, ``residual``."""
        if not self._left_out:
            return torch.stack([relative for _, relative in self._trace])
        return torch.stack([residual.index_copy(0, rows, relative) for rows, relative in self._trace])

    def _current(self) -> Verdict:
        return Verdict(
            z=self._z,
            fz=self._fz,
            residual=self._residual,
            status=self._status,
            steps=self._steps + self._steps_of_all,
        )
