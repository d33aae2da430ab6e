"""What a warning says about a failed solve: the cause that its trace shows, and the setting that belongs to it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import warnings

import pytest
import torch
from torch.nn.functional import dropout

from equilibria import (
    Anderson,
    Broyden,
    ConvergenceWarning,
    Implicit,
    NewtonKrylov,
    Picard,
    Reversible,
    Status,
    Stop,
    fixed_point,
    solve,
)
from equilibria.core.diagnosis import FORWARD, diagnosis
from slow_cases import one_in

EPS = torch.finfo(torch.float32).eps
X = torch.linspace(-2, 3, 128).view(2, 64)


def said(f, stop):
    solution = solve(f, torch.zeros_like(X), Picard(), stop)
    assert not solution.converged.all()
    return diagnosis(solution, stop, FORWARD, eps=EPS)


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
        (lambda z: 1.5 * z + X, Stop(), "not falling", r"began at 1.0e\+00 and came down to 3.3e-01"),
        (lambda z: -2 * z + X, Stop(), "not falling", "tells whether f contracts"),
        (lambda z: 0.5 * z + X + 1e-5 * torch.rand_like(z), Stop(rtol=1e-7), "near rounding", "rounding of f"),
        (lambda z: torch.tanh(0.5 * z) + X + 0.1 * torch.rand_like(z), Stop(), "stalled", "same bits twice"),
        (lambda z: 0.999 * z + X, Stop(max_evals=60), "falling slowly", "does not tell how many evaluations"),
        (lambda z: z - (z - X) ** 3 / (1 + (z - X) ** 2), Stop(rtol=1e-4), "falling slowly", "does not tell how many"),
        (lambda z: 1.5 * z + X, Stop(max_evals=4), "after few steps", r"stop=Stop\(max_evals=30\)"),
        (lambda z: (z - 1).log(), Stop(), "NaN or infinite", r"Already f\(z0\)"),
        (lambda z: z * z + 5, Stop(), "NaN or infinite", "after 6 steps"),
        (torch.cos, Stop(max_evals=1), "after a single evaluation", "more evaluations"),
    ],
    ids=["grows", "swings", "rounding", "noise", "slow", "power", "few", "start", "overflow", "once"],
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
    assert diagnosis(solution, stop, FORWARD, eps=EPS).what.startswith("The forward solve: 1 of 3 samples converged")
    assert diagnosis(solution, stop, FORWARD, eps=EPS).what.endswith("not falling")


def test_the_worst_residual_is_that_of_a_sample_that_failed():
    """Relative to a solution 0 the residual stays large, although the sample has converged."""
    rates, x, stop = torch.tensor([[0.2], [0.9]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), Stop(max_evals=40)
    solution = solve(lambda z: rates * z + x, torch.ones(2, 2), Picard(), stop)
    assert solution.status.tolist() == [Status.CONVERGED, Status.BUDGET_SPENT]
    assert solution.residual[0] > 1
    for text in (diagnosis(solution, stop, FORWARD, eps=EPS).what, str(solution)):
        assert f"worst residual {float(solution.residual[1]):.1e}" in text


@pytest.mark.parametrize("rate", [0.7, 0.9, 0.97])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("evals", [5, 12, 30])
def test_a_budget_that_is_named_is_enough(rate, solver, evals):
    """One kind of map falls geometrically, the other like a power of the evaluations, which no budget brings far."""
    spectrum = torch.linspace(-rate, rate, 64)
    for f in (lambda z: spectrum * z + X, lambda z: z - (z - X) ** 3 / (1 + (z - X) ** 2)):
        stop = Stop(rtol=1e-4, max_evals=evals)
        solution = solve(f, torch.ones_like(X), solver, stop)
        if not solution.converged.all():
            message = diagnosis(solution, stop, FORWARD, eps=EPS)
            if message.what.endswith("still falling"):
                budget = re.search(r"stop=Stop\(max_evals=(\d+)\)", message.advice)
                assert budget
                more = dataclasses.replace(stop, max_evals=int(budget.group(1)))
                assert solve(f, torch.ones_like(X), solver, more).converged.all()


SOLVERS = (Reversible(0.5), NewtonKrylov(), NewtonKrylov(1), NewtonKrylov(2, 0.9))


@pytest.mark.parametrize(
    ("rate", "solver", "evals"), one_in(3, itertools.product((0.7, 0.9), SOLVERS, (5, 12, 30, 60, 90)))
)
def test_a_budget_counts_evaluations_and_not_steps(rate, solver, evals):
    """The budget that was named for solvers whose steps cost several evaluations could be below the one just spent."""
    spectrum, x = torch.linspace(-rate, rate, 64, dtype=torch.float64), X.double()
    stop = Stop(rtol=1e-6, max_evals=evals)
    for f in (lambda z: spectrum * z + x, lambda z: rate * torch.sin(z) + x):
        solution = solve(f, torch.ones_like(x), solver, stop)
        if not solution.converged.all():
            message = diagnosis(solution, stop, FORWARD, eps=EPS)
            budget = re.search(r"stop=Stop\(max_evals=(\d+)\)", message.advice)
            if budget:
                assert int(budget.group(1)) > evals
                more = dataclasses.replace(stop, max_evals=int(budget.group(1)))
                enough = solve(f, torch.ones_like(x), solver, more).converged.all()
                assert enough or not message.what.endswith("still falling")


def test_steps_that_are_charged_in_full_are_named_beside_the_evaluations():
    """ "8 evaluations" of a budget of 30 looked as if the solve had given up early."""
    stop = Stop(rtol=1e-8, max_evals=30)
    solution = solve(lambda z: torch.cos(3 * z) + torch.roll(z, 1, 1), torch.zeros(2, 20), NewtonKrylov(), stop)
    assert solution.evals < 20
    said = diagnosis(solution, stop, FORWARD, eps=EPS).what
    assert (
        f"{solution.evals} evaluations (the budget of 30 is spent, since each step is charged in full), worst" in said
    )
    solution = solve(lambda z: 0.99 * z + X, torch.zeros_like(X), Picard(), stop)
    assert "30 evaluations, worst" in diagnosis(solution, stop, FORWARD, eps=EPS).what


@pytest.mark.parametrize("width", [16, 64])
def test_dropout_inside_f_is_named_wherever_its_solve_ends(width):
    """Of the solves that stall, most have it; of those that never fall, few, and these were not told."""
    causes, stop = set(), Stop(rtol=1e-4, max_evals=60)

    def f(z, x, weight):
        return torch.tanh(0.6 * dropout(z, 0.1) @ weight + x)

    for seed in range(12):
        torch.manual_seed(seed)
        x, weight = torch.randn(1, width), torch.randn(width, width)
        weight /= torch.linalg.eigvals(weight).abs().max()
        solution = solve(functools.partial(f, x=x, weight=weight), torch.zeros(1, width), Picard(), stop)
        found = diagnosis(solution, stop, FORWARD, eps=EPS)
        cause = found.kind.rpartition(", ")[2]
        causes.add(cause)
        assert cause not in ("stalled", "not falling") or "dropout inside it" in found.advice
    assert causes & {"stalled", "not falling"}


def test_coupling_is_the_last_resort():
    """It is named where all samples have failed together, and nowhere else."""
    rates = torch.full((64, 1), 0.1)
    stop = Stop(max_evals=30)

    def advice(rates, stop=stop):
        solution = solve(lambda z: rates * z + 1, torch.zeros(len(rates), 1), Picard(), stop)
        return diagnosis(solution, stop, FORWARD, eps=EPS).advice

    rates[7] = 1.5
    assert "coupled" not in advice(rates)  # 63 of 64 have converged
    assert "coupled" not in advice(torch.full((64, 1), 0.9), Stop(max_evals=5))  # too few to tell
    assert "If f mixes the 64 samples, pass coupled=True." in advice(torch.full((64, 1), 1.5))


def test_a_solve_that_fails_at_a_contraction_is_not_called_an_expansion():
    """With a radius of 0.99 and a rotation, the residual hardly falls."""
    c, s = 0.99 * torch.cos(torch.tensor(1.5)), 0.99 * torch.sin(torch.tensor(1.5))
    turn = torch.tensor([[c, -s], [s, c]])
    message = said(lambda z: (z.view(-1, 2) @ turn).view(2, 64) + X, Stop())
    assert "does not contract" not in message.advice


def heard(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if warning.category is ConvergenceWarning]


def test_the_adjoint_solve_says_that_its_budget_is_its_own():
    x = X.clone().requires_grad_()
    rule = Implicit(Picard(), Stop(rtol=1e-6, max_evals=30))
    z = fixed_point(lambda z: 0.9 * z + x, torch.zeros_like(X), stop=Stop(max_evals=200), gradient=rule).z
    (message,) = heard(lambda: z.sum().backward())
    assert message.startswith("The adjoint solve of Implicit(): 0 of 2 samples converged, 30 evaluations")
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
    assert ["weights" in message for message in heard(lambda: train(1.5))] == [True, False, False]
    assert (
        "max_evals="
        in heard(
            lambda: fixed_point(lambda z: 0.9 * z + X, torch.zeros_like(X), solver=Picard(), stop=Stop(max_evals=2))
        )[0]
    )


def both_ways(f, *, stop, backward, z0=X, transform=False):
    """The warnings of a forward and a backward pass."""
    how = {"solver": Picard(), "stop": stop, "gradient": Implicit(Picard(), backward)}
    shift = torch.zeros_like(z0)

    def loss(shift):
        return fixed_point(lambda z, shift: f(z) + shift, torch.zeros_like(z0), shift, **how).z.float().pow(2).sum()

    with warnings.catch_warnings(record=True, action="always", category=ConvergenceWarning) as caught:
        torch.func.grad(loss)(shift) if transform else torch.autograd.grad(loss(shift.requires_grad_()), shift)
    return [str(each.message) for each in caught if issubclass(each.category, ConvergenceWarning)]


WEIGHT = 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Stop.rtol=1e-06. is below:RuntimeWarning")
@pytest.mark.parametrize("transform", [False, True], ids=["autograd", "func"])
@pytest.mark.parametrize("autocast", [False, True], ids=["state", "autocast"])
def test_the_rounding_of_a_half_precision_f_is_named_in_the_backward_solve_too(autocast, transform):
    """It was said to fall, with a budget that was not enough, or to be random: the rows of the solve are in float32."""
    x = X if autocast else X.bfloat16()
    weight = WEIGHT.to(x.dtype)
    stops = {"stop": Stop(rtol=5e-2, max_evals=40), "backward": Stop(rtol=1e-6, max_evals=40)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (message,) = both_ways(lambda z: torch.tanh(z @ weight) + x, z0=x, transform=transform, **stops)
    assert message.startswith("The adjoint solve")
    assert "near rounding. This may be the rounding of f" in message


def test_half_precision_does_not_hide_an_f_that_does_not_contract():
    """A hundred rounding units of bfloat16 are 0.8: every failure was called rounding, and an rtol of 0.5 advised."""
    x, weight = X.bfloat16(), (3 * WEIGHT).bfloat16()
    stop = Stop(rtol=2e-2)
    messages = both_ways(lambda z: torch.tanh(z @ weight + 0.1 * x), z0=x, stop=stop, backward=stop)
    assert len(messages) == 2
    for message in messages:
        assert "near rounding" not in message
        assert "an rtol above" not in message


@pytest.mark.parametrize(("evals", "word"), [(40, "falling slowly"), (100, "still falling")])
def test_no_tolerance_is_advised_that_accepts_what_is_no_solution(evals, word):
    """The residuals are 0.45 and 0.14, and the advice was an rtol above 0.9 and 0.3."""
    solution = solve(lambda z: 0 * z + X, torch.zeros_like(X), Picard(0.02), Stop(max_evals=evals))
    message = diagnosis(solution, Stop(max_evals=evals), FORWARD, eps=EPS)
    assert message.what.endswith(word)
    assert "rtol" not in message.advice
