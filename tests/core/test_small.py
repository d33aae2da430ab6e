"""Large batches of small states: the same results block by block, few evaluations, and no linear system per sample."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from equilibria import Anderson, Broyden, Implicit, Picard, Shine, Status, Stop, Unroll, fixed_point, solve
from equilibria.core.progress import chosen
from equilibria.solvers.history import TINY, eliminated, quotient
from slow_cases import some_slow

SOLVERS = [Picard(), Picard(0.7), Anderson(), Anderson(mixing=0.8), Anderson(window=2), Broyden(), Broyden(rank=1)]


def kepler(samples: int, *, dtype=torch.float64, largest=0.5):
    """M and e of E = M + e·sin E, and its solution by Newton's method."""
    generator = torch.Generator().manual_seed(0)
    mean, eccentricity = torch.rand(2, samples, 1, generator=generator, dtype=torch.float64)
    mean, eccentricity = 2 * math.pi * mean, largest * eccentricity
    exact = mean.clone()
    for _ in range(30):
        exact -= (exact - mean - eccentricity * exact.sin()) / (1 - eccentricity * exact.cos())
    return mean.to(dtype), eccentricity.to(dtype), exact.to(dtype)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalar_equations_take_the_evaluations_of_the_secant_method(solver, dtype):
    """A window longer than the state makes the step worse: with six pairs Anderson needed 19 evaluations."""
    mean, e, exact = kepler(2000, dtype=dtype)
    with torch.no_grad():
        rough = solve(lambda z: mean + e * z.sin(), torch.zeros_like(mean), solver, Stop(max_evals=50))
        assert rough.converged.all()
        assert rough.evals <= 7
        rtol = 1e-14 if dtype == torch.float64 else 1e-6
        fine = solve(lambda z: mean + e * z.sin(), torch.zeros_like(mean), solver, Stop(rtol=rtol, max_evals=50))
    assert fine.evals <= 10
    torch.testing.assert_close(fine.fz, exact)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("width", [1, 3, *some_slow(2, 4, 5)])
def test_blocks_change_nothing(solver, width, monkeypatch):
    """Samples that converge early or late, that spend the budget, that break, and that start at their solution."""
    generator = torch.Generator().manual_seed(1)
    a, x = torch.randn(2, 64, width, generator=generator, dtype=torch.float64)
    a[5], x[5] = 0.0, 0.0
    a[11] = torch.nan
    hopeless = torch.arange(64)[:, None] == 20

    def f(z):
        mixed = torch.roll(z, 1, dims=1)
        own = torch.where(z.abs() > 40, math.nan, torch.cos(mixed) - 0.2 * z * mixed)
        return torch.where(hopeless, z + 1, x) + a * ~hopeless * own

    batch = importlib.import_module("equilibria.core.batch")
    stop = Stop(rtol=1e-9, max_evals=25)
    with torch.no_grad():
        whole = solve(f, torch.zeros(64, width).double(), solver, stop)
        monkeypatch.setattr(batch, "BLOCK", 10 * width)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        blocks = solve(f, torch.zeros(64, width).double(), solver, stop)
    assert set(whole.status.tolist()) == set(Status)
    assert blocks.history is None
    assert len(blocks.residuals[0]) == 7
    assert blocks.evals == whole.evals
    for name in ("z", "fz", "residual", "status", "steps", "trace"):
        torch.testing.assert_close(getattr(blocks, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_linear_systems_of_few_unknowns_are_solved_in_few_steps(solver, width):
    """Once the window is as long as the state, the step is exact."""
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    matrix = 0.6 * matrix / torch.linalg.matrix_norm(matrix, 2)
    x = torch.randn(9, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found = solve(lambda z: z @ matrix + x, torch.zeros_like(x), solver, Stop(rtol=1e-12, max_evals=300))
    assert found.converged.all()
    exact = torch.linalg.solve(torch.eye(width).double() - matrix.mT, x.mT).mT
    torch.testing.assert_close(found.z, exact)
    if solver in (Anderson(), Broyden()):
        assert found.evals <= 3 * width + 2


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=str)
@pytest.mark.parametrize("width", [1, 3])
def test_the_gradient_through_the_steps_of_small_states_is_right(solver, width):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, width, generator=generator, dtype=torch.float64).requires_grad_()
    # Samples that are done have differences of 0.
    scale = torch.linspace(0, 0.7, 6, dtype=torch.float64)[:, None]

    def gradient(rule, which):
        stop = Stop(rtol=1e-13, max_evals=40)
        z = fixed_point(
            lambda z: scale * torch.sin(z.roll(1, 1)) + x,
            torch.ones_like(x),
            solver=which,
            stop=stop,
            gradient=rule,
            on_failure="ignore",
        ).z
        return torch.autograd.grad(z.square().sum(), x)[0]

    exact = gradient(Implicit(stop=Stop(rtol=1e-13, max_evals=100)), Anderson())
    torch.testing.assert_close(gradient(Unroll(), solver), exact, rtol=1e-5, atol=1e-5)
    if solver == Broyden():
        shine = gradient(Shine(), solver)
        assert torch.cosine_similarity(shine.flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chosen_numbers_are_those_that_were_given(dtype):
    top = torch.finfo(dtype).max
    special = torch.tensor([0.0, 1.5, -3e-40, top, -top, math.inf, -math.inf, math.nan], dtype=dtype)
    x, y = torch.cartesian_prod(special, special).unbind(1)
    for numbers in (slice(None), slice(0, 3)):
        a, b = x[numbers, None], y[numbers, None]
        for mask in (torch.ones(len(a), 1), torch.zeros(len(a), 1), torch.arange(len(a))[:, None] % 2):
            picked = chosen(mask.bool(), a, b)
            torch.testing.assert_close(picked, torch.where(mask.bool(), a, b), rtol=0, atol=0, equal_nan=True)


def test_elimination_is_that_of_lapack():
    generator = torch.Generator().manual_seed(4)
    for size in range(1, TINY + 1):
        half = torch.randn(20, size, size, generator=generator, dtype=torch.float64)
        system, target = half @ half.mT + torch.eye(size), half[:, 0]
        torch.testing.assert_close(eliminated(system, target), torch.linalg.solve(system, target))
    assert not torch.isfinite(eliminated(torch.zeros(1, 2, 2), torch.ones(1, 2))).any()


def test_quotients_by_zero_are_zero_with_a_finite_gradient():
    x, y = torch.tensor([1.0, 0.0, 4.0]).requires_grad_(), torch.tensor([0.0, 0.0, 2.0])
    assert quotient(x, y).tolist() == quotient(x.detach(), y).tolist() == [0.0, 0.0, 2.0]
    (g,) = torch.autograd.grad(quotient(x, y).sum(), x)
    assert g.tolist() == [0.0, 0.0, 0.5]
