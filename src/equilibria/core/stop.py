"""When a sample is done, by the norm of its residual; how its solve ended, and whether a failure is heard.

Letters: B batch, L leaves of the state, N flattened state.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.state import Layout


def row_norm(x: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Euclidean norm of each row, accurate even where squares under- or overflow (1e-30 in float32)."""
    if x.is_cuda and x.dtype == torch.float32:  # float64 needs no look at the numbers, which would wait for the device
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).to(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=1)
    if x.shape[1] <= 1 or x.device.type != "cpu" or not x.shape[0]:
        return norm
    small = _SMALL[x.dtype]
    least, most = [norm.item()] * 2 if x.shape[0] == 1 else (bound.item() for bound in norm.detach().aminmax())
    if least > small and most < math.inf:  # False if a number is NaN
        return norm
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    precise = scale[:, 0] * torch.linalg.vector_norm(x / scale, dim=1)
    return torch.where((norm > small) & torch.isfinite(norm), norm, precise)


_SMALL = {
    dtype: math.sqrt(torch.finfo(dtype).tiny / torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64)
}
"""A computed norm below this may come from squares that have lost digits."""

NORMS = ("l2", "max")


def relative(norm: Tensor, size: Tensor) -> Float[Tensor, " R"]:
    """norm / size of each row, or the largest of its leaves; 0 where the norm is 0, whatever the size."""
    return largest_leaf(torch.where(norm == 0, 0.0, norm / size))


def largest_leaf(x: Tensor) -> Float[Tensor, " R"]:
    """The largest number of each sample, where there is one per leaf."""
    return x if x.ndim == 1 else x.amax(dim=1)


@dataclasses.dataclass(frozen=True)
class Stop:
    """When a sample is done: ‖r‖ ≤ rtol·‖f(z)‖ + atol with r = f(z) − z, or the budget is spent.

    A sample is also done when ‖r‖ ≤ 10·eps·(‖r‖ at the start), with the eps of float64 if the state has it, else of
    float32. That recognises a fixed point 0, which no tolerance relative to ‖f(z)‖ can. With ``rtol = atol = 0``
    nothing ever counts as converged and the whole budget is used: a network of fixed depth.
    """

    rtol: float = 1e-3
    """Tolerance relative to ‖f(z)‖, per sample."""
    atol: float = 0.0
    """Absolute tolerance, in the unit of the state's norm, per sample. Choose it for the scale of the state: 1e-6
    would call any state of size 1e-8 converged."""
    max_evals: int = 30
    """Budget of the solve in evaluations of f, the same unit for every solver; a whole number ≥ 1."""
    best: bool = True
    """Return the iterate with the smallest residual (True) or the last one (False)."""
    norm: Literal["l2", "max"] | Callable[[Any], Any] = "l2"
    """‖·‖ of one sample: Euclidean, largest magnitude, or a function of a state that returns one number per sample."""
    per_leaf: bool = False
    """Measure each tensor of the state by itself, so that a large one cannot hide a small one: a sample is done when
    all of its leaves are, and its residual is the largest of theirs."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("rtol", "atol"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"Stop({name}={getattr(self, name)}): a tolerance is a finite number ≥ 0; try {name}=1e-3, or 0."
                )
        if self.max_evals < 1:
            raise ValueError(
                f"Stop(max_evals={self.max_evals}): the budget counts evaluations of f and is at least 1; try 30."
            )
        if not (callable(self.norm) or self.norm in NORMS):
            raise ValueError(f"Stop(norm={self.norm!r}): the norm is 'l2', 'max' or a function of the state.")
        if self.per_leaf and callable(self.norm):
            raise ValueError(
                "Stop(per_leaf=True) with a norm of your own: each leaf is measured by 'l2' or 'max'; give one of "
                "these, or let the function weigh the leaves and leave per_leaf out."
            )

    def norms(self, x: Float[Tensor, "B N"], layout: Layout) -> Float[Tensor, " B"] | Float[Tensor, "B L"]:
        """‖·‖ of each row, or with ``per_leaf`` of each leaf of each row."""
        if callable(self.norm):
            found = self.norm(layout.unpack(x))
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            if not isinstance(found, Tensor) or found.numel() != len(x) or found.ndim > 1:
                raise ValueError(f"Stop(norm=…) returned {shape}; it must return one number per sample, [{len(x)}].")
            return found.reshape(len(x)).to(x.dtype)
        if self.per_leaf and len(layout.sizes) > 1:
            pieces = x.split(layout.sizes, dim=1)
            return torch.stack([self._norm(piece) for piece in pieces], dim=1)
        return self._norm(x)

    def _norm(self, x: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        if self.norm == "l2" or not x.shape[1]:  # the largest of no numbers is an error
            return row_norm(x)
        return torch.linalg.vector_norm(x, math.inf, dim=1)

    @property
    def has_tolerance(self) -> bool:
        """True if a sample can count as converged; otherwise the solve is a network of fixed depth."""
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
    Status.CONVERGED: "The residual is below rtol·‖f(z)‖ + atol, or at the rounding of its first value.",
    Status.BUDGET_SPENT: (
        "The budget was spent before the tolerance was met: raise max_evals, loosen rtol, or make f more contractive "
        "(weight norm, Jacobian penalty; see stability.spectral_radius)."
    ),
    Status.NONFINITE: (
        "f or a step of the solver became NaN or infinite: look for such numbers among inputs and weights, lower the "
        "learning rate, or damp the solver."
    ),
}

OnFailure = Literal["warn", "raise", "ignore"]
"""The reaction to a solve that does not converge."""


def is_heard(stop: Stop, on_failure: OnFailure) -> bool:
    """True if a failed solve with this stop is reported; without a tolerance a solve cannot fail."""
    return stop.has_tolerance and on_failure != "ignore"
