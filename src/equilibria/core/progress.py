"""The progress of each sample in a solve: its status so far, and the iterate that will be returned.

On a GPU the loop learns one iteration late that all samples are done, and evaluates f once too often. In return it
never waits for the current step. The results are the same, since samples that are done do not move.

Letters: B batch, R samples that are still evaluated, L leaves of the state, N flattened state, K evaluations of f.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.core.outcome import Outcome, Residuals
from equilibria.core.state import Layout
from equilibria.core.stop import Status, Stop, largest_leaf, relative
from equilibria.core.trees import take_rows

WORTH = 0.75
"""The batch is compacted when at most this fraction of it is still active."""
ROUNDING = 10
"""A sample has also converged when its residual is at most this many eps times its first residual."""


class Progress:
    """Applies a ``Stop`` to the pairs (z, f(z)) of a solve, sample by sample."""

    def __init__(self, z: Float[Tensor, "B N"], stop: Stop, layout: Layout) -> None:
        self._stop, self._layout = stop, layout
        self._z, self._fz = z, z.new_full((1, 1), math.nan).expand_as(z)  # f(z) stays NaN until it is finite once
        self._residual = torch.full((len(z),), math.inf, dtype=z.dtype, device=z.device)
        self._counter = torch.int16 if stop.max_evals < 1 << 15 else torch.int64
        self._steps: Tensor | None = None
        """Steps that are counted one by one, once a sample is done."""
        self._steps_of_all = 0
        """Steps that all samples took together, which are added to those."""
        self._active = torch.ones(len(z), dtype=torch.bool, device=z.device)
        self._broken: Tensor | None = None
        """True for samples that are not finite any more; None if all are."""
        self.moving, self._count = len(z) > 0, len(z)
        self._floor: Tensor | None = None
        self._highest_floor = math.inf
        self._flags = _Flags(late=z.is_cuda)
        self.trace: list[Residuals] = []
        """The relative residuals after each evaluation."""
        self._places: Tensor | None = None
        """The indices of the samples at hand among all of them, if some have been dropped."""
        self._whole: Outcome | None = None
        """The outcome of all samples, if some have been dropped; that of the samples at hand is out of date in it."""

    def update(self, z: Float[Tensor, "R N"], fz: Float[Tensor, "R N"], r: Float[Tensor, "R N"]) -> Bool[Tensor, " R"]:
        """Record the new pair (z, f(z)), with r = f(z) − z; returns True for samples that are still active."""
        residual, size = self._stop.norms(_constant(r), self._layout), self._stop.norms(_constant(fz), self._layout)
        ratio = residual / size  # NaN where something is not finite, and where both are 0
        if self._floor is None:
            self._floor = ROUNDING * torch.finfo(residual.dtype).eps * residual
            if not self._flags.late and len(residual):
                self._highest_floor = float(self._floor.amax())
        if self._flags.late:
            self._record(z, fz, residual, size, _all(self._met(residual, size, ratio)))
        elif not (self._all_moving and self._only_better(z, fz, residual, size, ratio)):
            met = _all(self._met(residual, size, ratio))
            if _is_finite(ratio) and _is_finite(size):
                self._advance(z, fz, largest_leaf(ratio), met)
            else:
                self._record(z, fz, residual, size, met)
        return self._active

    def _met(self, residual: Tensor, size: Tensor, ratio: Tensor) -> Bool[Tensor, "R ..."]:
        """True where ‖r‖ counts as converged, leaf by leaf; NaN never does."""
        stop = self._stop
        if not stop.has_tolerance:
            return torch.zeros_like(residual, dtype=torch.bool)
        met = ratio <= stop.rtol if stop.atol == 0 else residual <= stop.atol + stop.rtol * size
        if self._floor is not None and (self._flags.late or not _least(residual) > self._highest_floor):
            met = met | (residual <= self._floor)
        return met

    @property
    def _all_moving(self) -> bool:
        return self._count == self._active.shape[0]

    def _only_better(self, z: Tensor, fz: Tensor, residual: Tensor, size: Tensor, ratio: Tensor) -> bool:
        """If every sample has improved and none is done, as in most steps, store the pair and return True."""
        # Two smallest numbers, which read faster than masks are made. NaN is not larger than anything.
        if self._stop.atol == 0 and self._stop.has_tolerance:
            if not (_least(ratio) > self._stop.rtol and _least(residual) > self._highest_floor):
                return False
        elif _any(_all(self._met(residual, size, ratio))):
            return False
        # A NaN in one leaf makes the ratio NaN, and the difference of two infinite numbers is NaN.
        ratio = largest_leaf(ratio)
        before = self._residual if self._stop.best else math.inf
        if not _least_difference(before, ratio) > 0:
            return False
        self._note(z, fz, ratio, ratio)
        return True

    def _advance(self, z: Tensor, fz: Tensor, ratio: Tensor, met: Tensor) -> None:
        """Record a pair that is finite in all samples."""
        active, all_moving = self._active, self._all_moving
        self._active = active & ~met
        self._count = int(torch.count_nonzero(self._active))
        self.moving = self._count > 0
        if self._stop.best and self._all_improved(ratio, None if all_moving else active):
            # The samples that are not active have not moved, and neither have their residuals.
            self._note(z, fz, ratio, ratio)
            return
        improved = active & ((ratio < self._residual) | met) if self._stop.best else active
        residual = chosen(improved[:, None], ratio[:, None], self._residual[:, None])[:, 0]
        if not _any(active & ~improved):
            self._note(z, fz, residual, residual)
        else:
            shown = chosen(active[:, None], ratio[:, None], residual[:, None])[:, 0]
            self._note(chosen(improved[:, None], z, self._z), chosen(improved[:, None], fz, self._fz), residual, shown)

    def _all_improved(self, ratio: Tensor, active: Tensor | None) -> bool:
        """True if all active samples have improved, and no other residual has changed. None stands for all samples."""
        if active is None:
            return _least_difference(self._residual, ratio) > 0
        return not _any((ratio < self._residual) ^ active) and _least(self._residual - ratio) >= 0

    def _note(self, z: Tensor, fz: Tensor, residual: Tensor, shown: Tensor) -> None:
        """Store a pair as the best one of every sample, and ``shown`` in the trace."""
        self._z, self._fz, self._residual = z, fz, residual
        self.trace.append(Residuals(shown, self._places))

    def _record(self, z: Tensor, fz: Tensor, residual: Tensor, size: Tensor, met: Tensor) -> None:
        """Record any pair, finite or not; at most two numbers are read back from the device."""
        active, stop = self._active, self._stop
        ratio = relative(residual, size)
        finite = _all(torch.isfinite(residual) & torch.isfinite(size))
        met = active & finite & met
        first = torch.isinf(self._residual)
        improved = active & finite & ((ratio < self._residual) | met | first | (not stop.best))
        broken = active & ~finite
        self._broken = broken = broken if self._broken is None else self._broken | broken
        self._residual = torch.where(improved, ratio, self._residual)
        self.trace.append(Residuals(torch.where(active, ratio, self._residual), self._places))
        stale = (active & ~improved) | broken
        self._active = active & finite & ~met
        any_stale, self._count = self._flags.read(torch.stack([stale.any().long(), self._active.sum()]))
        self.moving = self._count > 0
        if any_stale:
            rows = improved[:, None]
            self._z = torch.where(rows, z, self._z)  # releases the old z before the new f(z) is made
            self._fz = torch.where(rows, fz, self._fz)
        else:
            self._z, self._fz = z, fz

    def freeze(self, proposal: Float[Tensor, "R N"]) -> Float[Tensor, "R N"]:
        """The next iterate: samples that are done stay where they are."""
        if self._all_moving and not self._flags.late:
            self._steps_of_all += 1
            return proposal
        one = self._active.view(torch.uint8)
        self._steps = one.to(self._counter) if self._steps is None else self._steps + one
        return chosen(self._active[:, None], proposal, self._z)

    @property
    def converged(self) -> bool:
        """True if every sample has converged; up to date only on a CPU."""
        return not self.moving and (self._broken is None or not _any(self._broken))

    @property
    def worth_compacting(self) -> bool:
        """True if enough samples are done to drop them from the batch."""
        return self._count <= WORTH * self._active.shape[0]

    def still_active(self) -> Int[Tensor, " R"]:
        """The indices of the active samples; on a GPU this waits for the device."""
        return self._active.nonzero()[:, 0]

    def take(
        self, index: Int[Tensor, " K"], z: Float[Tensor, "R N"], fz: Float[Tensor, "R N"]
    ) -> tuple[Float[Tensor, "K N"], Float[Tensor, "K N"], Float[Tensor, "K N"], Bool[Tensor, " K"]]:
        """Continue with these samples, all of them active, and store the outcomes of the others.

        Returns the part of z, f(z) and f(z) − z that is theirs, and that they are active.
        """
        if self._whole is None:  # what is shared with f's arguments and with the trace is not written to
            now = self._current()
            self._whole = dataclasses.replace(now, z=now.z.clone(), fz=now.fz.clone(), residual=now.residual.clone())
        else:
            self._keep(self._whole)
        self._places = index if self._places is None else self._places[index]
        theirs = take_rows((z, fz), index)
        self._z = theirs[0] if self._z is z else take_rows(self._z, index)
        self._fz = theirs[1] if self._fz is fz else take_rows(self._fz, index)
        self._residual, self._steps = take_rows((self._residual, self._steps), index)
        self._active, self._broken = self._active.new_ones(len(index)), None
        self._floor = None if self._floor is None else self._floor[index]
        self._count, self._flags = len(index), _Flags(late=self._flags.late)
        return *theirs, theirs[1] - theirs[0], self._active

    def outcome(self) -> Outcome:
        """The outcome of all samples, in their order."""
        if self._whole is None:
            return self._current()
        self._keep(self._whole)
        return self._whole

    def _keep(self, whole: Outcome) -> None:
        assert self._places is not None
        now = self._current()
        for field in dataclasses.fields(Outcome):
            getattr(whole, field.name).index_copy_(0, self._places, getattr(now, field.name))

    def _current(self) -> Outcome:
        """The outcome of the samples at hand."""
        status = int(Status.BUDGET_SPENT) * self._active.long()
        if self._broken is not None:
            status = status + int(Status.NONFINITE) * self._broken.long()
        if self._steps is None:
            steps = torch.full_like(status, self._steps_of_all)
        else:
            steps = self._steps.long() + self._steps_of_all
        return Outcome(z=self._z, fz=self._fz, residual=self._residual, status=status, steps=steps)


def chosen(mask: Bool[Tensor, "R 1"], x: Float[Tensor, "R N"], y: Float[Tensor, "R N"]) -> Float[Tensor, "R N"]:
    """x where the mask is true, else y."""
    if x.shape[1] == 1 and x.device.type == "cpu" and not (x.requires_grad or y.requires_grad):
        # On a random mask ``where`` mispredicts every second branch; ``lerp`` is five times as fast. With weights 0 and
        # 1 it returns y and x exactly, unless a number is not finite or overflows, and the sum reveals that.
        mixed = torch.lerp(y, x, mask.view(torch.uint8).to(x.dtype))
        if _is_finite(mixed):
            return mixed
    return torch.where(mask, x, y)


def _all(flags: Tensor) -> Bool[Tensor, " R"]:
    """True for a sample if it is true for all of its leaves."""
    return flags if flags.ndim == 1 else flags.all(dim=1)


def _any(flags: Bool[Tensor, " R"]) -> bool:
    """``flags.any()`` as a bool, forty times as fast on a CPU."""
    number = flags.numel()
    return number > 0 and bool((flags if number == 1 else flags.view(torch.uint8).amax()).item())


def _least(x: Tensor) -> float:
    """The smallest number, NaN if there is one, and infinity if there is none."""
    number = x.numel()
    return (x if number == 1 else x.amin()).item() if number else math.inf


def _least_difference(x: Tensor | float, y: Tensor) -> float:
    """The smallest number of x − y; for one sample without an operator."""
    if y.numel() == 1:
        return (x.item() if isinstance(x, Tensor) else x) - y.item()
    return _least(x - y)


def _is_finite(x: Tensor) -> bool:
    """True only if every number is finite; False also where their sum overflows."""
    return math.isfinite((x if x.numel() == 1 else x.sum()).item())


def _constant(x: Tensor) -> Tensor:
    """x without its graph."""
    return x.detach() if x.requires_grad else x


class _Flags:
    """Reads flags from the device; if ``late``, those of the previous call, so that the device need not be idle."""

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self._before: tuple[Tensor, torch.cuda.Event | None] | None = None

    def read(self, flags: Int[Tensor, " 2"]) -> list[int]:
        """``[1 if a copy is needed else 0, number of active samples]``.

        If ``late``, always reports that a copy is needed, which is safe, and the count of the previous call; the first
        call reports ``sys.maxsize``.
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
