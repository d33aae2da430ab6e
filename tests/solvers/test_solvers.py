"""Properties of single solvers beyond the laws of the suite."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from equilibria import Anderson, Broyden, NewtonKrylov, Picard, Reversible, Stop, solve
from equilibria.peak_memory import PeakMemory
from equilibria.testing.problems import NAMES, problems, tanh_map


def test_a_full_window_and_a_restart_still_converge():
    problem = problems()[NAMES[1]]
    for solver in (Anderson(window=3), Broyden(rank=4), Broyden(rank=1), NewtonKrylov(inner=3)):
        with torch.no_grad():
            stop = Stop(rtol=1e-6, max_evals=3000)
            assert solve(problem.map(), problem.start(), solver, stop).converged.all(), solver


def test_quasi_newton_needs_fewer_evaluations():
    # Symmetric with eigenvalues up to 0.97: plain iteration needs log(1e-6)/log(0.97) steps.
    rates = torch.linspace(-0.5, 0.97, 24, dtype=torch.float64)
    start, stop = torch.zeros(2, 24, dtype=torch.float64), Stop(rtol=1e-6, atol=0, max_evals=1000)

    def evaluations(solver):
        with torch.no_grad():
            return solve(lambda z: rates * z + 1, start, solver, stop).evals

    plain = evaluations(Picard())
    assert plain > 300
    assert evaluations(Anderson()) < 0.25 * plain
    assert evaluations(Broyden()) < 0.25 * plain
    assert evaluations(NewtonKrylov(inner=24)) < 0.25 * plain


def dense_broyden(f, z, *, steps, memory):
    """The iterates by the equation in the docstring, with H as a matrix, and the last H."""
    h, updates, iterates = -torch.eye(len(z), dtype=z.dtype), 0, [z]
    g, before = f(z) - z, None
    for _ in range(steps):
        if before is not None:
            dz, dg = z - before[0], g - before[1]
            h = h + torch.outer(dz - h @ dg, h.T @ dz) / (dz @ (h @ dg))
            updates += 1
            if updates > memory:
                h, updates = -torch.eye(len(z), dtype=z.dtype), 0
        before = (z, g)
        z = z - h @ g
        g = f(z) - z
        iterates.append(z)
    return torch.stack(iterates), h


@pytest.mark.parametrize("memory", [1, 3, 30])
def test_broyden_is_the_method_of_its_equation(memory):
    _, x, f = tanh_map(n=12, batch=1, gain=0.95, seed=3)
    x = x.detach()
    path, h = dense_broyden(lambda z: f(z[None])[0].detach(), torch.zeros_like(x[0]), steps=14, memory=memory)
    fixed_depth = Stop(rtol=0, atol=0, max_evals=15, best=False)
    with torch.no_grad():
        solution = solve(f, torch.zeros_like(x), Broyden(memory), fixed_depth)
    assert_close(solution.z[0], path[-1], rtol=1e-9, atol=1e-9)
    v = torch.linspace(-1, 1, 12, dtype=x.dtype)[None]
    assert_close(solution.history.apply(v)[0], -h @ v[0], rtol=1e-7, atol=1e-7)
    assert_close(solution.history.apply_transposed(v)[0], -h.T @ v[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Broyden(rank=3)], ids=str)
def test_iterating_on_at_the_floor_of_float32_stays_there(solver):
    _, x, f = tanh_map(n=64, batch=4, gain=0.95)
    fixed_depth = Stop(rtol=0, atol=0, max_evals=300)
    with torch.no_grad():
        solution = solve(lambda z: f(z.double()).float(), torch.zeros_like(x).float(), solver, fixed_depth)
    assert torch.isfinite(solution.trace).all()
    assert solution.residual.max() < 1e-6
    assert solution.trace[-100:].max() < 1e-3


def test_broyden_ends_a_linear_problem_in_2n_steps():
    # D. M. Gay (1979): good Broyden is exact after at most 2n steps on a linear system.
    n = 6
    weight = torch.randn(n, n, dtype=torch.float64)
    x = torch.randn(1, n, dtype=torch.float64)
    with torch.no_grad():
        solution = solve(
            lambda z: z @ weight + x, torch.zeros_like(x), Broyden(rank=40), Stop(rtol=1e-9, atol=0, max_evals=20)
        )
    assert solution.converged.all()
    assert solution.steps.item() <= 2 * n + 1


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (lambda: Picard(damping=0), r"\(0, 1\]"),
        (lambda: Anderson(window=1), "at least 2"),
        (lambda: Anderson(mixing=0), r"\(0, 2\]"),
        (lambda: Anderson(ridge=-1), "≥ 0"),
        (lambda: Broyden(rank=0), "at least 1"),
        (lambda: NewtonKrylov(inner=0), "at least 1"),
        (lambda: NewtonKrylov(forcing=1), r"\(0, 1\)"),
        (lambda: Reversible(1.0), "not 1"),
        (lambda: Anderson(history_dtype=torch.float16), "float16 would overflow"),
        (lambda: Broyden(history_dtype=torch.int8), "history_dtype=torch.int8"),
    ],
)
def test_hyper_parameters_are_checked(solver, words):
    with pytest.raises(ValueError, match=words):
        solver()


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=lambda s: type(s).__name__)
def test_a_window_in_bfloat16_takes_less_memory_and_few_more_evaluations(solver):
    factor, offset = torch.linspace(0.5, 0.9, 4096), torch.linspace(-1, 1, 4096)
    peaks, evals = [], []
    for one in (solver, dataclasses.replace(solver, history_dtype=torch.bfloat16)):
        with PeakMemory() as memory, torch.no_grad():
            solution = solve(lambda z: torch.addcmul(offset, z, factor), torch.zeros(2, 4096), one, Stop(rtol=1e-5))
        assert solution.converged.all()
        peaks.append(memory.peak)
        evals.append(solution.evals)
    # Half of the 10 and 21 states that are kept, less one that is read at a time.
    assert (peaks[0] - peaks[1]) / (2 * 4096 * 4) >= {Anderson: 4, Broyden: 8.5}[type(solver)]
    assert evals[1] <= evals[0] + 3


def test_a_small_state_takes_few_inner_iterations():
    z0 = torch.zeros(3, 1, dtype=torch.float64)
    many, one = (solve(torch.cos, z0, NewtonKrylov(inner=inner), Stop(rtol=1e-12, max_evals=40)) for inner in (50, 1))
    assert many.converged.all()
    assert many.evals == one.evals
    assert torch.equal(many.z, one.z)
