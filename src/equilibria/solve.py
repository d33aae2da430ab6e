"""The only loop of the library: iterate a solver until every sample has reached its fixed point.

Letters: B batch, N flattened state, K evaluations of f. State ``z``, map ``f``, Jacobian ``J``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Map = Callable[[Float[Tensor, "B *state"]], Float[Tensor, "B *state"]]
History = Any
"""What a solver remembers from one step to the next: its own choice of value."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """When a sample is done: ‖f(z) − z‖ ≤ atol + rtol·‖f(z)‖, or the budget is spent.

    With ``rtol = atol = 0`` nothing ever counts as converged and the whole budget is used: a network of fixed depth.
    """

    rtol: float = 1e-3
    """Tolerance relative to ‖f(z)‖, per sample."""
    atol: float = 1e-6
    """Absolute tolerance, in the unit of the state's Euclidean norm, per sample."""
    max_evals: int = 30
    """Budget of the solve in evaluations of f, the same unit for every solver; a whole number ≥ 1."""
    best: bool = True
    """Return the iterate with the smallest residual (True) or the last one (False)."""

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"Stop({name}={value}): a tolerance is a finite number ≥ 0; try {name}=1e-3, or 0.")
        if not isinstance(self.max_evals, int) or self.max_evals < 1:
            raise ValueError(
                f"Stop(max_evals={self.max_evals}): the budget counts evaluations of f and must be a whole number, "
                "at least 1; try 30."
            )

    @property
    def has_tolerance(self) -> bool:
        """Whether anything can count as converged; if not, the solve is a network of fixed depth."""
        return self.rtol > 0 or self.atol > 0


class Status(enum.IntEnum):
    """How the solve of one sample ended. ``status.advice`` says what to do about it."""

    CONVERGED = 0
    BUDGET_SPENT = 1
    NONFINITE = 2

    @property
    def advice(self) -> str:
        """One sentence: what happened and what to try."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "The residual is below atol + rtol·‖f(z)‖.",
    Status.BUDGET_SPENT: (
        "The budget was spent before the tolerance was met, and the iterate that the stop asks for was returned: raise "
        "max_evals, loosen rtol (bfloat16 reaches about 1e-2), or make f more contractive (weight norm, Jacobian "
        "penalty; see stability.spectral_radius); and see that f gives the same bits twice, with no dropout inside."
    ),
    Status.NONFINITE: (
        "f or the solver's step became NaN or infinite, and the best iterate with a finite f was returned, or the "
        "start if there was none: look for non-finite inputs or weights, lower the learning rate, or damp the solver."
    ),
}


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
    """What the solver remembers at the end (Shine reads Broyden's inverse from it)."""
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
        """The next iterate and the new history, from z and fz = f(z). More evaluations of f are counted."""


class DifferentiableMap(ABC):
    """A map that brings its own Jacobian–vector product; of any other, ``torch.func.jvp`` is taken."""

    @abstractmethod
    def __call__(self, z: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """f(z)."""

    @abstractmethod
    def jvp(self, z: Float[Tensor, "B *state"], v: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """J(z)·v."""


@dataclasses.dataclass(frozen=True)
class AffineMap(DifferentiableMap):
    """u ↦ L(u) + factor·offset with a known linear part, so that Jacobian–vector products need no derivative."""

    linear: Map
    offset: Tensor
    factor: Tensor | None = None
    """One number a sample, [B 1 … 1], with which nobody has to keep the product; None for 1."""

    def __call__(self, z: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """L(z) + factor·offset."""
        linear = self.linear(z)
        return linear + self.offset if self.factor is None else torch.addcmul(linear, self.offset, self.factor)

    def jvp(self, z: Float[Tensor, "B *state"], v: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """L(v)."""
        return self.linear(v)


class Evaluator:
    """The map as solvers see it: flat ``[B N]``, counted, in the dtype of the algebra (float32 or wider).

    ``active`` tells which samples still move, ``remaining`` how many evaluations are left.
    """

    def __init__(self, f: Map, z0: Tensor, max_evals: int) -> None:
        _check_start(z0)
        self._f, self._shape, self.dtype, self._device = f, z0.shape, z0.dtype, z0.device
        self.algebra = algebra_dtype(z0.dtype)
        self.autocast = Autocast(z0.device.type)
        self.evals, self._max_evals = 0, max_evals
        self.active = torch.ones(len(z0), dtype=torch.bool, device=z0.device)

    @property
    def remaining(self) -> int:
        """Evaluations left in the budget."""
        return self._max_evals - self.evals

    def forfeit(self, count: int) -> None:
        """Takes unused evaluations out of the budget.

        A solver whose steps differ in cost between samples gives back nothing of what it did not need: otherwise the
        budget of a sample would depend on the other samples of its batch.
        """
        self._max_evals -= count

    def shaped(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B *state"]:
        """The iterate in the shape and dtype of the state."""
        return z.to(self.dtype).view(self._shape)

    def rounded(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """The nearest value that the state's dtype can hold: the point at which f is really evaluated."""
        return z if self.dtype == self.algebra else z.to(self.dtype).to(self.algebra)

    def __call__(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """f(z), counted."""
        self.evals += 1
        given = self.shaped(z)
        version = 0 if given.is_inference() else given._version
        with self.autocast.on():
            fz = self._f(given)
        self._check_value(fz)
        if not given.is_inference() and given._version != version:
            raise ValueError(
                "f changed its argument z in place, and the iteration would go on from a wrong value; return a new "
                "tensor (no z.mul_(…), no inplace=True in the first layer), or begin f with z = z.clone()."
            )
        return fz.reshape(z.shape).to(self.algebra)

    def jvp(self, z: Float[Tensor, "B N"], v: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """J(z)·v, counted as one evaluation."""
        self.evals += 1
        with self.autocast.on():
            if isinstance(self._f, DifferentiableMap):
                jv = self._f.jvp(self.shaped(z), self.shaped(v))
            else:
                jv = torch.func.jvp(self._f, (self.shaped(z),), (self.shaped(v),))[1]
        return jv.reshape(z.shape).to(self.algebra)

    def _check_value(self, fz: Any) -> None:
        if not isinstance(fz, Tensor):
            raise TypeError(f"f returned {type(fz).__name__}; it must return one tensor of the state's shape.")
        if fz.shape != self._shape:
            raise ValueError(
                f"f changed the shape from {tuple(self._shape)} to {tuple(fz.shape)}; a fixed point needs f(z) of the "
                "shape of z: look at the last layer of f, or at z0."
            )
        if fz.device != self._device:
            raise ValueError(
                f"f moved the state from {self._device} to {fz.device}; put z0 and all that f uses on one device."
            )
        if fz.dtype != self.dtype and not (self.autocast.enabled and fz.dtype.is_floating_point):
            raise TypeError(
                f"f changed the dtype from {self.dtype} to {fz.dtype}; make z0 {fz.dtype}, or end f with .to(z.dtype)."
            )


class Autocast:
    """The autocast state of one device type at the time of construction, to be entered again later."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.enabled = torch.is_autocast_enabled(device)
        self._dtype = torch.get_autocast_dtype(device)

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """The captured state, whatever the state of the caller."""
        same_dtype = torch.get_autocast_dtype(self._device) == self._dtype
        if self.enabled == torch.is_autocast_enabled(self._device) and (same_dtype or not self.enabled):
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._dtype, enabled=self.enabled)

    def off(self) -> contextlib.AbstractContextManager[Any]:
        """No autocast: for the solver's algebra."""
        return torch.autocast(self._device, enabled=False) if self.enabled else contextlib.nullcontext()


def algebra_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, inner products and histories for states of ``dtype``: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def row_norm(x: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Euclidean norm of each sample."""
    return torch.linalg.vector_norm(x, dim=1)


def solve(f: Map, z0: Float[Tensor, "B *state"], solver: Solver, stop: Stop) -> Solution:
    """The fixed point z = f(z) of each sample, found by ``solver`` from ``z0``; no gradient rule.

    Every sample is its own problem: it has its own residual, status and step count, is never moved again once it is
    done, and gets the same answer alone as in any batch. Operations are recorded by autograd if gradients are enabled,
    as anywhere in PyTorch; call it under ``torch.no_grad()``, or through a gradient rule, to avoid that.

    Args:
        f: the map, ``[B *state] -> [B *state]``; it must treat samples independently and give the same bits when
            called twice.
        z0: the start, finite, with the batch as first axis.
        solver: proposes the iterates.
        stop: tolerances and budget.

    Raises:
        ValueError, TypeError: z0 has no batch axis, is empty or not finite; f changes shape, dtype or device.
    """
    check_kind("solver", solver, Solver, "Anderson()")
    check_kind("stop", stop, Stop, "Stop(rtol=1e-3)")
    evaluate = Evaluator(f, z0, stop.max_evals)
    z = z0.reshape(len(z0), -1).to(evaluate.algebra)
    del z0  # a state that would be kept for nothing
    with evaluate.autocast.off():
        history, kept = solver.init(z), _Kept(z, stop)
        while True:
            fz = evaluate(z)
            evaluate.active = kept.update(z, fz)
            if not kept.moving or evaluate.remaining < solver.cost:
                break
            proposal, history = solver.step(evaluate, z, fz, history)
            z = kept.freeze(evaluate.rounded(proposal))
    return Solution(
        z=evaluate.shaped(kept.z),
        fz=evaluate.shaped(kept.fz),
        residual=kept.residual,
        status=kept.status,
        steps=kept.steps,
        evals=evaluate.evals,
        trace=torch.stack(kept.trace),
        history=history,
    )


class _Kept:
    """What the loop keeps of each sample: the iterate to be returned, its residual, status and steps."""

    def __init__(self, z: Tensor, stop: Stop) -> None:
        self._stop = stop
        self._active = torch.ones(len(z), dtype=torch.bool, device=z.device)
        self.z, self.fz = z, z.new_tensor(math.nan).expand_as(z)  # until f(z) is finite somewhere, f(z) is NaN
        self.residual = torch.full((len(z),), math.inf, dtype=z.dtype, device=z.device)
        self.status = torch.full((len(z),), int(Status.BUDGET_SPENT), device=z.device)
        self._steps, self._steps_of_all = torch.zeros(len(z), dtype=torch.long, device=z.device), 0
        self.trace: list[Tensor] = []
        self.moving, self._all_moving = True, True

    def update(self, z: Tensor, fz: Tensor) -> Tensor:
        """Judge the new pair (z, f(z)); returns which samples go on."""
        value, stop = fz.detach(), self._stop
        gap, size = row_norm(value - z.detach()), row_norm(value)
        tolerance = stop.atol + stop.rtol * size
        if self._all_moving and self._only_better(gap, gap / size, tolerance):
            self.z, self.fz = z, fz
            return self._active
        return self._judge(z, fz, gap, size, tolerance)

    @property
    def steps(self) -> Tensor:
        """Steps of each sample."""
        return self._steps + self._steps_of_all

    def _only_better(self, gap: Tensor, relative: Tensor, tolerance: Tensor) -> bool:
        """Whether every sample has improved and none is done, as in most steps: then little has to be noted."""
        better = relative < self.residual if self._stop.best else torch.isfinite(relative)
        if not (better & (gap > tolerance)).all():  # NaN is neither
            return False
        self.residual = relative
        self.trace.append(relative)
        return True

    def _judge(self, z: Tensor, fz: Tensor, gap: Tensor, size: Tensor, tolerance: Tensor) -> Tensor:
        active, stop = self._active, self._stop
        relative = torch.where(gap == 0, 0.0, gap / size)
        finite = torch.isfinite(gap) & torch.isfinite(size)
        met = active & finite & (gap <= tolerance) & stop.has_tolerance
        first = torch.isinf(self.residual)
        improved = active & finite & ((relative < self.residual) | met | first | (not stop.best))
        self.status = torch.where(met, int(Status.CONVERGED), self.status)
        self.status = torch.where(active & ~finite, int(Status.NONFINITE), self.status)
        self.residual = torch.where(improved, relative, self.residual)
        self.trace.append(torch.where(active, relative, self.residual))
        stale = (active & ~improved) | (self.status == Status.NONFINITE)
        self._active = active & finite & ~met
        flags = torch.stack([stale.any(), self._active.any(), self._active.all()])
        any_stale, self.moving, self._all_moving = flags.tolist()
        # While every sample improves, as is usual, the pair is kept by reference and nothing is copied.
        if any_stale:
            rows = improved[:, None]
            self.z, self.fz = torch.where(rows, z, self.z), torch.where(rows, fz, self.fz)
        else:
            self.z, self.fz = z, fz
        return self._active

    def freeze(self, proposal: Tensor) -> Tensor:
        """The next iterate: samples that are done stay where they are."""
        if self._all_moving:
            self._steps_of_all += 1
            return proposal
        self._steps = self._steps + self._active
        return torch.where(self._active[:, None], proposal, self.z)


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Refuses a value of another kind, above all the class where its instance is meant."""
    if not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r}"
        raise TypeError(f"{name} is {found}; it must be a {kind.__name__}, for example {example}.")


def _check_start(z0: Any) -> None:
    if not isinstance(z0, Tensor):
        raise TypeError(
            f"z0 is {type(z0).__name__}; the state is one tensor (B, *state): torch.stack or cat its parts."
        )
    if z0.ndim < 2:
        raise ValueError(
            f"z0 has shape {tuple(z0.shape)}; a state has a batch axis first and at least one axis after it, "
            "(B, *state): try z0[None] for one problem, z0[:, None] for a batch of scalar ones."
        )
    if z0.numel() == 0:
        raise ValueError(f"z0 has shape {tuple(z0.shape)}, which is empty; give at least one sample with one number.")
    if not z0.dtype.is_floating_point:
        raise TypeError(f"z0 has dtype {z0.dtype}; a state is real and floating: float64, float32, bfloat16, float16.")
    if not torch.isfinite(z0).all():
        bad = (~torch.isfinite(z0.detach().reshape(len(z0), -1)).all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"z0 is NaN or infinite in {len(bad)} of {len(z0)} samples ({bad[:8]}); start from finite values."
        )
