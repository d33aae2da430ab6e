"""Why a solve failed, as far as its own trace of residuals tells, and what to try.

Letters: B batch, K evaluations of f.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.core.solve import Solution
from equilibria.core.stop import Status, Stop


@dataclasses.dataclass(frozen=True)
class Solve:
    """The name of a solve in messages, and where its budget is set."""

    name: str
    """The subject of the message: "The forward solve"."""
    setting: str
    """The argument that holds its stop, with ``{}`` for the fields of the stop."""
    source: str
    """The numbers that are not finite if the solve has not taken a single step."""

    @property
    def is_forward(self) -> bool:
        """True for the solve whose stop is that of the ``Method``."""
        return self is FORWARD


_OF_RULE = "gradient=Implicit(stop=Stop({}))"
FORWARD = Solve("The forward solve", "stop=Stop({})", "f(z0)")
ADJOINT = Solve("The adjoint solve of Implicit()", _OF_RULE, "the gradient that the loss sends back, or ∂f/∂z,")
TANGENT = Solve("The tangent solve of Implicit()", _OF_RULE, "the tangent of an operand, or ∂f/∂z,")
_OWN = f"The budget and the tolerance of this solve are its own: {_OF_RULE.format('…')}."


@dataclasses.dataclass(frozen=True)
class Message:
    """A sentence about a failure and, apart from it, advice, which is given once for each kind."""

    what: str
    advice: str
    kind: str

    def __str__(self) -> str:
        return f"{self.what}. {self.advice}"


def diagnosis(solution: Solution, stop: Stop, solve: Solve, *, eps: float) -> Message:
    """The likeliest cause of a failure, from the trace of the worst sample that did not converge.

    Args:
        solution: a solution of which at least one sample did not converge.
        stop: the stop of the solve.
        solve: which solve it was.
        eps: the rounding unit of f.
    """
    failed = solution.status != Status.CONVERGED
    broken = solution.status == Status.NONFINITE
    total, done = len(failed), int((~failed).sum())
    which = broken if broken.any() else failed
    worst = int(torch.where(which, solution.residual, -1.0).nan_to_num(posinf=math.inf).argmax())
    if broken.any():
        said, advice = "NaN or infinite", _broken(int(solution.steps[worst]), solve)
    else:
        said, advice = _by_trace(solution.trace[:, worst].detach().double(), stop, solve, eps)
    what = (
        f"{solve.name}: {done} of {total} samples converged, {_evaluations(solution, stop)}, worst residual "
        f"{float(solution.residual[failed].max()):.1e}, {said}"
    )
    own = "" if solve.is_forward else f" {_OWN}"
    # Coupled samples that are solved one by one fail together; if some have converged, ``gradients.repeats`` sees it.
    together = total > 1 and done == 0 and said not in UNCOUPLED
    coupled = f" If f mixes the {total} samples, pass coupled=True." if together else ""
    return Message(what, f"{advice}{own}{coupled}", kind=f"{solve.name}, {said}")


def _evaluations(solution: Solution, stop: Stop) -> str:
    """Their number; with the budget, where steps were charged more evaluations than they needed."""
    said = f"{solution.evals} evaluations"
    if stop.max_evals - solution.evals < 2 or not (solution.status == Status.BUDGET_SPENT).any():
        return said
    return f"{said} (the budget of {stop.max_evals} is spent, since each step is charged in full)"


def _broken(steps: int, solve: Solve) -> str:
    if steps == 0:
        return f"Already {solve.source} is not finite: look for such numbers among inputs, weights and losses."
    return f"It happened after {steps} steps: make the weights smaller, lower the learning rate, or damp the solver."


WITHIN, WITHIN_ROUNDING = 5, 2
"""A budget is named if so many times the spent one would be enough; the second number is for a residual so small that
it may be the rounding of f."""
AMPLE = 2
"""The budget that is named is this many times the estimate, since most residuals fall more slowly towards the end."""
STEEPER = 1.05
"""A residual that falls like a power of the evaluations never comes to an end. Log-log slopes that grow by this factor
tell a geometric fall from it."""
LARGE = 0.1
"""A relative residual above this means that every evaluation still moves the state by a tenth of its size."""
SHORT = 10
"""A shorter trace shows no trend."""
NEAR_ROUNDING = 100
"""A residual of at most this many eps may be the rounding of f, unless it is ``LARGE``."""
UNCOUPLED = ("NaN or infinite", "after a single evaluation", "after few steps", "near rounding")
"""The causes that say nothing about coupled samples."""
_SMALLER = "smaller weights (weight norm, initialisation, learning rate, Jacobian penalty)"


def _by_trace(trace: Float[Tensor, " K"], stop: Stop, solve: Solve, eps: float) -> tuple[str, str]:
    """The cause in a word and the advice, for a sample that is finite and has spent its budget."""
    spent, last, first, end = len(trace), float(trace.min()), float(trace[0]), float(trace[-1])
    if spent == 1:
        return "after a single evaluation", "The start is no fixed point: give more evaluations, or a better start."
    if spent < SHORT:
        budget = solve.setting.format(f"max_evals={max(30, _rounded_up(AMPLE * stop.max_evals))}")
        return "after few steps", f"They are too few to tell why: try {budget}, or a better start."
    slope, tiny = _slope(trace), last <= min(NEAR_ROUNDING * eps, LARGE)
    if 0 < stop.rtol < last and _is_geometric(trace):
        needed = spent + math.log(stop.rtol / last) / slope
        if needed <= (WITHIN_ROUNDING if tiny else WITHIN) * spent:
            each = stop.max_evals / spent  # a step of some solvers costs several evaluations
            budget = solve.setting.format(f"max_evals={_rounded_up(AMPLE * needed * each)}")
            return "still falling", f"At this rate {budget} should be enough{_looser('; so should', last)}."
    if tiny:
        advice = f"This may be the rounding of f: give an rtol above {2 * last:.0e}, or compute in a wider dtype."
        return "near rounding", advice
    if end > max(LARGE, 10 * last):
        advice = f"The residual fell to {last:.1e} and grew to {end:.1e} again: give f {_SMALLER}, or damp the solver."
        return "growing", advice
    if slope * spent < -math.log(2):
        return "falling slowly", (
            f"The trace does not tell how many evaluations would be enough: give f {_SMALLER} or take Broyden()"
            f"{_looser(', or accept', last)}; stability.spectral_radius measures f."
        )
    if last > LARGE:
        return "not falling", (
            f"The residual began at {first:.1e} and came down to {last:.1e}: give f {_SMALLER}, or take another "
            "solver, such as Broyden(); stability.spectral_radius tells whether f contracts. If f does not give the "
            "same bits twice (dropout inside it), draw its masks before the solve."
        )
    return "stalled", (
        f"The residual stays at {last:.1e}. If f does not give the same bits twice (dropout inside it), draw its masks "
        f"before the solve; else give f {_SMALLER}, or an rtol above {2 * last:.0e}; stability.spectral_radius tells "
        "whether f contracts."
    )


def _looser(words: str, last: float) -> str:
    """The advice to loosen the tolerance to the residual that was reached; "" where that is too large."""
    return "" if last > LARGE else f"{words} an rtol above {2 * last:.0e}"


def _slope(trace: Float[Tensor, " K"]) -> float:
    """Change of log ‖r‖ per evaluation at the end of the trace; of medians, so that single jumps do not count."""
    span = len(trace) // 5
    before, after = trace[-2 * span : -span].median(), trace[-span:].median()
    return float((after / before).log()) / span


def _is_geometric(trace: Float[Tensor, " K"]) -> bool:
    """True if the end of the trace falls by about the same factor per evaluation, so that it can be extrapolated."""
    span, count = len(trace) // 5, len(trace)
    first, second, third = (float(trace[count - i * span : count - (i - 1) * span].median()) for i in (3, 2, 1))
    if not first > second > third > 0:
        return False
    places = [count - (i - 0.5) * span for i in (3, 2, 1)]
    powers = [
        math.log(a / b) / math.log(after / before)
        for a, b, before, after in zip((first, second), (second, third), places[:-1], places[1:], strict=True)
    ]
    return powers[1] > STEEPER * powers[0]


def _rounded_up(evaluations: float) -> int:
    """The next number of one or two digits and zeros: 37 → 40, 412 → 420."""
    unit = 10 ** max(1, math.floor(math.log10(evaluations)) - 1)
    return math.ceil(evaluations / unit) * unit
