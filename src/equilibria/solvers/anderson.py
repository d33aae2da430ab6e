"""Anderson acceleration, and its normal equations, which gain one row per step and are solved once per step.

The equations of a batch are stored as tensors. Those of one sample on a CPU are stored as Python's floats: solving five
unknowns in Python takes ten microseconds, and the forty operators on tensors would take ten times as long.

Letters: B batch, N flattened state, W window, U differences stored so far.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.evaluator import Evaluator
from equilibria.core.solver import Iterate, Solver
from equilibria.solvers.history import (
    TINY,
    bordered,
    check_history_dtype,
    combine,
    dot,
    empty_window,
    in_float32,
    inner,
    is_derived,
    quotient,
    ridge_solve,
    selected,
    small_dtype,
    stored_difference,
    vector_at,
)


@dataclasses.dataclass(frozen=True, eq=False)
class AndersonHistory:
    """The last residual, and the differences between successive pairs (z, f(z)); the oldest is overwritten first."""

    step: int
    plain: Float[Tensor, "B N"]
    """z + β·r, the plain step from the last point."""
    r: Float[Tensor, "B N"]
    moves: Float[Tensor, "B W N"]
    """Δz_i + β·Δr_i."""
    dr: Float[Tensor, "B W N"]
    """Δr_i."""
    normal: Normal
    """Inner products of the Δr_i with each other, and with the last residual."""


@dataclasses.dataclass(frozen=True)
class Anderson(Solver):
    """z ← z + β·r − Σ_i γ_i (Δz_i + β·Δr_i),  γ = argmin ‖r − Σ_i γ_i Δr_i‖² + λ·Σ_i γ_i²‖Δr_i‖²,  r = f(z) − z.

    Type II, D. G. Anderson (1965), in the difference form of H. F. Walker and P. Ni (SIAM J. Numer. Anal. 49, 2011,
    eq. 2.2). Deviations: (1) the ridge λ is relative to the length of each difference, so that it neither stops
    convergence near the solution nor depends on the scale of the state, and as it grows the step becomes plain
    iteration; (2) the Gram matrix is kept in float64 and gains one row per step; (3) a state of N numbers has at most N
    differences, since more would be linearly dependent.
    """

    window: int = 6
    """Number of pairs (z, f(z)) that are combined, at most N + 1; 2·window states are stored."""
    mixing: float = 1.0
    """β: how far the step goes along the combined residual."""
    ridge: float = 1e-7
    """λ: relative Tikhonov regularisation of the least-squares problem."""
    history_dtype: torch.dtype | None = None
    """Dtype of the window: ``torch.bfloat16`` halves its memory, and the algebra keeps its own dtype. None for the
    dtype of the algebra."""

    by_row: ClassVar[bool] = True
    secant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window < 2:
            raise ValueError(f"Anderson(window={self.window}): at least 2 pairs are combined; try 6, or use Picard().")
        if not 0 < self.mixing <= 2:
            raise ValueError(f"Anderson(mixing={self.mixing}): the mixing lies in (0, 2]; try 1.0.")
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"Anderson(ridge={self.ridge}): a ridge is a finite number ≥ 0; try 1e-7.")
        check_history_dtype("Anderson", self.history_dtype)

    def init(self, z: Float[Tensor, "B N"]) -> AndersonHistory:
        """A history without differences."""
        size = min(self.window - 1, z.shape[1]) if z.shape[1] > 1 else 0  # see ``_secant``
        return AndersonHistory(
            step=0,
            plain=z,
            r=z,
            moves=empty_window(z, size, dtype=self.history_dtype),
            dr=empty_window(z, size, dtype=self.history_dtype),
            normal=empty_normal(z, size),
        )

    def step(self, f: Evaluator, at: Iterate, history: AndersonHistory) -> tuple[Tensor, AndersonHistory]:
        """The combination of the window; the first step is a plain one."""
        h, r = history, at.r
        plain = at.z.lerp(at.fz, self.mixing) if self.mixing != 1.0 else at.fz
        if r.shape[1] == 1:
            return self._secant(h, plain, r)
        if h.step == 0:
            return plain, dataclasses.replace(h, step=1, plain=plain, r=r)
        size = h.dr.shape[1]
        slot, used = (h.step - 1) % size, min(h.step, size)
        dr = stored_difference(h.dr, slot, r, h.r)
        moves = stored_difference(h.moves, slot, plain, h.plain)
        filled = (dr, moves) if used == size else (dr[:, :used], moves[:, :used])
        normal = h.normal.updated(filled[0], slot, r)
        weights = normal.weights(ridge=self.ridge, tiny=r.shape[1] <= TINY, like=r)
        following = AndersonHistory(step=h.step + 1, plain=plain, r=r, moves=moves, dr=dr, normal=normal)
        return combine(weights, filled[1], onto=plain), following

    def _secant(self, h: AndersonHistory, plain: Tensor, r: Tensor) -> tuple[Tensor, AndersonHistory]:
        """The step for samples of one number: the latest difference determines γ, so no window is needed."""
        following = dataclasses.replace(h, step=h.step + 1, plain=plain, r=r)
        if h.step == 0:
            return plain, following
        gamma = quotient(r, r - h.r)
        return torch.addcmul(plain, gamma, plain - h.plain, value=-1 / (1 + self.ridge)), following

    def select(self, history: AndersonHistory, rows: Int[Tensor, " R"]) -> AndersonHistory:
        """The history of these samples; their differences stay in the same storage."""
        windows = {"moves": selected(history.moves, rows), "dr": selected(history.dr, rows)}
        parts = {name: getattr(history, name)[rows] for name in ("plain", "r")}
        return dataclasses.replace(history, normal=history.normal.select(rows), **windows, **parts)


class Normal(ABC):
    """The inner products of the differences Δr_i with each other, and those of each Δr_i with the last residual r."""

    @abstractmethod
    def updated(self, window: Float[Tensor, "B U N"], slot: int, r: Float[Tensor, "B N"]) -> Normal:
        """The products after the difference at ``slot`` of the window was replaced, with a new residual."""

    @abstractmethod
    def weights(self, *, ridge: float, tiny: bool, like: Tensor) -> Float[Tensor, "B U"]:
        """−γ with γ = argmin ‖r − Σ_i γ_i Δr_i‖² + λ·Σ_i γ_i²‖Δr_i‖², in the dtype of ``like``; see ``ridge_solve``."""

    @abstractmethod
    def select(self, rows: Int[Tensor, " R"]) -> Normal:
        """The products of these samples."""


def empty_normal(z: Float[Tensor, "B N"], size: int) -> Normal:
    """The products of a window of ``size`` differences, before the first one is stored."""
    if z.shape[0] == 1 and size <= FEW and z.device.type == "cpu" and not is_derived(z):
        return NormalOfOne(gram=[], along=[], size=size)
    gram = torch.zeros(z.shape[0], size, size, dtype=small_dtype(z), device=z.device)
    return NormalOfBatch(gram=gram, along=gram.new_zeros(z.shape[0], 0))


FEW = 8
"""Systems of more unknowns are solved by LAPACK: the time of Python's elimination grows with their cube."""


@dataclasses.dataclass(frozen=True, eq=False)
class NormalOfBatch(Normal):
    """The products of each sample, as tensors."""

    gram: Float[Tensor, "B W W"]
    """Inner products of the Δr_i."""
    along: Float[Tensor, "B U"]
    """Inner products of the Δr_i with r."""

    def updated(self, window: Float[Tensor, "B U N"], slot: int, r: Float[Tensor, "B N"]) -> NormalOfBatch:
        """The products with one more row, or with another one at ``slot``."""
        along = inner(window, r).to(self.gram.dtype)
        # Δr_iᵀΔr = Δr_iᵀr − Δr_iᵀr₋, both known except for the newest Δr: this saves one pass over the window.
        row = (along if along.shape == self.along.shape else along[:, :slot]) - self.along
        newest = vector_at(window, slot, r.dtype)
        square = dot(newest, newest).to(row.dtype).unsqueeze(1)
        row = torch.cat([row[:, :slot], square, row[:, slot + 1 :]], dim=1)
        return NormalOfBatch(gram=bordered(self.gram, slot, row), along=along)

    def weights(self, *, ridge: float, tiny: bool, like: Tensor) -> Float[Tensor, "B U"]:
        """−γ of each sample."""
        used = self.along.shape[1]
        gram = self.gram if used == self.gram.shape[1] else self.gram[:, :used, :used]
        return -ridge_solve(gram, self.along, ridge=ridge, tiny=tiny).to(like.dtype)

    def select(self, rows: Int[Tensor, " R"]) -> NormalOfBatch:
        """The products of these samples."""
        return NormalOfBatch(gram=self.gram[rows], along=self.along[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class NormalOfOne(Normal):
    """The products of a batch of one sample, as numbers."""

    gram: list[list[float]]
    """Inner products of the Δr_i, row by row."""
    along: list[float]
    """Inner products of the Δr_i with r."""
    size: int
    """W."""

    def updated(self, window: Float[Tensor, "1 U N"], slot: int, r: Float[Tensor, "1 N"]) -> Normal:
        """The products with one more row, or with another one at ``slot``; as tensors if a derivative needs them."""
        if is_derived(window, r):
            return self._of_batch(r).updated(window, slot, r)
        (along,) = inner(window, r).tolist()
        newest = vector_at(window, slot, r.dtype)
        row = [new - old for new, old in zip(along, self.along, strict=False)]  # the newest has no old product
        row[slot:] = [dot(newest, newest).item(), *row[slot + 1 :]]
        rows = [[*old[:slot], new, *old[slot + 1 :]] for old, new in zip(self.gram, row, strict=False)]
        rows[slot:] = [row, *rows[slot + 1 :]]
        return NormalOfOne(gram=rows, along=along, size=self.size)

    def _of_batch(self, like: Tensor) -> NormalOfBatch:
        gram = torch.zeros(1, self.size, self.size, dtype=small_dtype(like))
        known = len(self.gram)
        gram[0, :known, :known] = gram.new_tensor(self.gram).view(known, known)
        return NormalOfBatch(gram=gram, along=gram.new_tensor([self.along]))

    def weights(self, *, ridge: float, tiny: bool, like: Tensor) -> Float[Tensor, "1 U"]:
        """−γ."""
        return like.new_tensor([[-number for number in _solved(self.gram, self.along, in_float32(ridge))]])

    def select(self, rows: Int[Tensor, " R"]) -> Normal:
        """The products of this sample."""
        return self


def _solved(gram: list[list[float]], target: list[float], ridge: float) -> list[float]:
    """The result of ``ridge_solve`` for one sample, up to rounding: the system is scaled, and then eliminated."""
    scale = [1 / math.sqrt(row[i]) if row[i] > 0 else 1.0 for i, row in enumerate(gram)]
    system = []
    for i, (row, factor, right) in enumerate(zip(gram, scale, target, strict=True)):
        scaled = [x * factor * other for x, other in zip(row, scale, strict=True)]
        scaled[i] += ridge if row[i] > 0 else 1.0
        system.append([*scaled, right * factor])
    solution = _eliminated(system)
    if solution is None or not math.isfinite(sum(solution)):
        return [0.0] * len(target)
    return [x * factor for x, factor in zip(solution, scale, strict=True)]


def _eliminated(rows: list[list[float]]) -> list[float] | None:
    """The solution of the system whose rows end with its right side, with partial pivoting; None if a pivot is 0."""
    done = []
    while rows:
        pivot = max(rows, key=lambda row: abs(row[0]))
        head, *rest = pivot
        if head == 0:
            return None
        done.append((head, rest))
        others = [row for row in rows if row is not pivot]
        rows = []
        for first, *row in others:
            factor = first / head
            rows.append([x - factor * y for x, y in zip(row, rest, strict=True)])
    solution: list[float] = []
    for head, rest in reversed(done):
        right = rest.pop()
        for x, known in zip(rest, solution, strict=True):
            right -= x * known
        solution.insert(0, right / head)
    return solution
