"""What a warning says about a failed solve: the cause that its trace shows, and the setting that belongs to it."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from equilibria import ConvergenceWarning, Implicit, Picard, Status, Stop, fixed_point, solve
from equilibria.core.diagnosis import FORWARD, diagnosis

X = torch.linspace(-2, 3, 128).view(2, 64)


def said(f, stop):
    solution = solve(f, torch.zeros_like(X), Picard(), stop)
    assert not solution.converged.all()
    return diagnosis(solution, stop, FORWARD)


@pytest.mark.parametrize("rate", [0.7, 0.9, 0.95])
def test_a_residual_that_falls_names_a_budget_that_is_enough(rate):
    message = said(lambda z: rate * z + X, Stop(max_evals=12))
    assert message.what.endswith("still falling")
    budget = int(re.search(r"stop=Stop\(max_evals=(\d+)\)", message.advice).group(1))  # pyright: ignore
    assert solve(lambda z: rate * z + X, torch.zeros_like(X), Picard(), Stop(max_evals=budget)).converged.all()
    assert budget < 200


@pytest.mark.parametrize(
    ("f", "stop", "what", "advice"),
    [
        (lambda z: 1.5 * z + X, Stop(), "not falling", "does not contract here"),
        (lambda z: -2 * z + X, Stop(), "not falling", "does not contract here"),
        (lambda z: 0.5 * z + X + 1e-5 * torch.rand_like(z), Stop(rtol=1e-7), "stalled", "rounding of f"),
        (lambda z: torch.tanh(0.5 * z) + X + 0.1 * torch.rand_like(z), Stop(), "stalled", "same bits twice"),
        (lambda z: (z - 1).log(), Stop(), "NaN or infinite", r"Already f\(z0\)"),
        (lambda z: z * z + 5, Stop(), "NaN or infinite", "after 6 steps"),
        (torch.cos, Stop(max_evals=1), "after a single evaluation", "more evaluations"),
    ],
    ids=["grows", "swings", "rounding", "noise", "start", "overflow", "once"],
)
def test_other_failures_are_told_apart(f, stop, what, advice):
    message = said(f, stop)
    assert message.what.endswith(what)
    assert re.search(advice, message.advice)


def test_a_residual_that_falls_without_rtol_has_no_estimate():
    assert not said(lambda z: 0.9 * z + X, Stop(rtol=0, atol=1e-6)).what.endswith("still falling")


def test_the_worst_sample_speaks():
    """The first sample converges at once, the second falls slowly, the third grows."""
    rates = torch.tensor([[0.01], [0.9], [1.5]])
    stop = Stop(max_evals=20)
    solution = solve(lambda z: rates * z + 1, torch.zeros(3, 1), Picard(), stop)
    assert solution.status.tolist() == [Status.CONVERGED, Status.BUDGET_SPENT, Status.BUDGET_SPENT]
    assert diagnosis(solution, stop, FORWARD).what.startswith("The forward solve: 1 of 3 samples converged")
    assert diagnosis(solution, stop, FORWARD).what.endswith("not falling")


def heard(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if warning.category is ConvergenceWarning]


def test_the_adjoint_solve_says_that_its_budget_is_its_own():
    x = X.clone().requires_grad_()
    rule = Implicit(Picard(), Stop(rtol=1e-6, max_evals=10))
    z = fixed_point(lambda z: 0.9 * z + x, torch.zeros_like(X), stop=Stop(max_evals=200), gradient=rule).z
    (message,) = heard(lambda: z.sum().backward())
    assert message.startswith("The adjoint solve of Implicit(): 0 of 2 samples converged, 10 evaluations")
    budget = re.search(r"gradient=Implicit\(stop=Stop\(max_evals=(\d+)\)\)", message)
    assert budget
    assert 130 <= int(budget.group(1)) <= 270  # 0.9¹³¹ = 1e-6
    assert "are its own: gradient=Implicit(stop=Stop(…))." in message


def test_a_cotangent_that_is_not_finite_is_named():
    x = X.clone().requires_grad_()
    z = fixed_point(lambda z: 0.5 * z + x, torch.zeros_like(X)).z
    (message,) = heard(lambda: z.backward(torch.full_like(z, torch.nan)))
    assert "Already the gradient that the loss sends back" in message


def test_the_advice_is_given_once_for_each_line_and_kind():
    def train(rate):
        for _ in range(3):
            fixed_point(lambda z: rate * z + X, torch.zeros_like(X), solver=Picard(), stop=Stop(max_evals=12))

    first, *others = heard(lambda: train(0.9))
    assert len(others) == 2
    assert all(first.startswith(other[:-1]) and len(other) < 110 for other in others)
    assert "max_evals=" in first
    assert not any("max_evals=" in other for other in others)
    assert ["contract" in message for message in heard(lambda: train(1.5))] == [True, False, False]
    assert (
        "max_evals="
        in heard(
            lambda: fixed_point(lambda z: 0.9 * z + X, torch.zeros_like(X), solver=Picard(), stop=Stop(max_evals=2))
        )[0]
    )
