"""Conformance: every solver of the catalogue, on problems with known fixed points."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from equilibria import Anderson, Broyden, NewtonKrylov, Picard, Reversible, Status, Stop, solve
from equilibria.solvers import CATALOGUE
from equilibria.training import PeakMemory
from problems import PROBLEMS, SOLVERS, tanh_map

MEMBERS = [*SOLVERS.values(), Reversible(0.8), Anderson(half=True), Broyden(half=True)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# Plain iterations need a contraction; so does the reversible one.
LIMITED = (Picard, Reversible)


def test_the_catalogue_is_covered():
    assert {type(solver) for solver in MEMBERS} == set(CATALOGUE)


PAIRS = [
    pytest.param(problem, solver, id=f"{type(solver).__name__} on {problem.name}")
    for problem in PROBLEMS
    for solver in MEMBERS
    if problem.contractive or not isinstance(solver, LIMITED)
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("problem", "solver"), PAIRS)
def test_finds_the_known_fixed_point(problem, solver, dtype):
    tolerance = TOLERANCE[dtype]
    stop = Stop(rtol=tolerance, atol=0, max_evals=400)
    with torch.no_grad():
        solution = solve(problem.on(dtype), problem.start(dtype), solver, stop)
    assert solution.converged.all()
    z, f = solution.z, problem.on(dtype)
    true_residual = (f(z) - z).norm(dim=1) / f(z).norm(dim=1)
    assert (true_residual <= 1.01 * tolerance).all()
    torch.testing.assert_close(solution.residual, true_residual, rtol=1e-2, atol=1e-12)
    # |z - z*| <= |(I - J)^-1| |residual|, and the inverse is below 40 on all three problems.
    assert (z.double() - problem.exact).norm(dim=1).max() <= 40 * tolerance * problem.exact.norm(dim=1).max()


@pytest.mark.parametrize(("problem", "solver"), PAIRS)
def test_alone_as_in_a_batch(problem, solver):
    stop, dtype = Stop(rtol=1e-4, atol=0, max_evals=300), torch.float32
    with torch.no_grad():
        together = solve(problem.on(dtype), problem.start(dtype), solver, stop)
        for row in range(len(problem.x)):
            alone = solve(problem.on(dtype, [row]), problem.start(dtype, [row]), solver, stop)
            assert alone.steps.item() == together.steps[row].item()
            torch.testing.assert_close(alone.z[0], together.z[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", [*MEMBERS, NewtonKrylov()], ids=str)
@pytest.mark.parametrize("budget", [9, 14, 23])
def test_alone_as_in_a_batch_when_the_budget_binds(solver, budget):
    problem, stop, dtype = PROBLEMS[0], Stop(rtol=1e-9, atol=0, max_evals=budget), torch.float64
    with torch.no_grad():
        together = solve(problem.on(dtype), problem.start(dtype), solver, stop)
        assert not together.converged.all()
        for row in range(len(problem.x)):
            alone = solve(problem.on(dtype, [row]), problem.start(dtype, [row]), solver, stop)
            assert alone.status.item() == together.status[row].item()
            assert alone.steps.item() == together.steps[row].item()
            torch.testing.assert_close(alone.z[0], together.z[row], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", MEMBERS, ids=lambda s: type(s).__name__)
def test_permutes_with_its_samples(solver):
    problem, order = PROBLEMS[0], [3, 0, 4, 1, 2]
    stop, dtype = Stop(rtol=1e-8, max_evals=200), torch.float64
    with torch.no_grad():
        plain = solve(problem.on(dtype), problem.start(dtype), solver, stop)
        permuted = solve(problem.on(dtype, order), problem.start(dtype, order), solver, stop)
    assert permuted.steps.tolist() == plain.steps[order].tolist()
    torch.testing.assert_close(permuted.z, plain.z[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("solver", MEMBERS, ids=lambda s: type(s).__name__)
def test_keeps_the_budget(solver, budget):
    problem, calls = PROBLEMS[1], []
    f = problem.on(torch.float64)

    def counted(z):
        calls.append(1)
        return f(z)

    with torch.no_grad():
        solution = solve(counted, problem.start(torch.float64), solver, Stop(rtol=1e-12, atol=0, max_evals=budget))
    assert solution.evals == len(calls) <= budget
    if not isinstance(solver, NewtonKrylov):  # it pays for a whole step, needed or not
        assert solution.evals > budget - solver.cost
    assert (solution.status == Status.BUDGET_SPENT).all()


@pytest.mark.parametrize("solver", MEMBERS, ids=lambda s: type(s).__name__)
def test_contains_a_nan(solver):
    problem = PROBLEMS[0]
    f, weight = problem.on(torch.float32), problem.weight.float()
    poisoned = problem.x.float().clone()
    poisoned[1] = torch.nan
    others = [0, 2, 3, 4]
    with torch.no_grad():
        start, stop = problem.start(torch.float32), Stop(rtol=1e-5, max_evals=300)
        good = solve(f, start, solver, stop)
        mixed = solve(lambda z: problem.apply(z, weight, poisoned), start, solver, stop)
    assert mixed.status.tolist() == [0, int(Status.NONFINITE), 0, 0, 0]
    assert torch.equal(mixed.z[others], good.z[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", MEMBERS, ids=lambda s: type(s).__name__)
def test_half_precision_states(solver, dtype):
    problem = PROBLEMS[0]
    with torch.no_grad():
        solution = solve(problem.on(dtype), problem.start(dtype), solver, Stop(rtol=2e-2, max_evals=60))
    assert solution.z.dtype == dtype
    assert solution.converged.all()


@pytest.mark.parametrize("solver", MEMBERS, ids=lambda s: type(s).__name__)
def test_a_start_at_the_solution_costs_one_evaluation(solver):
    problem = PROBLEMS[1]
    with torch.no_grad():
        solution = solve(problem.on(torch.float64), problem.exact, solver, Stop(rtol=1e-6))
    assert solution.evals == 1
    assert (solution.steps == 0).all()


@pytest.mark.parametrize("solver", MEMBERS, ids=lambda s: type(s).__name__)
def test_is_a_frozen_value(solver):
    assert dataclasses.replace(solver) == solver
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.anything = 1


def test_a_full_window_and_a_restart_still_converge():
    problem = PROBLEMS[2]
    for solver in (Anderson(window=3), Broyden(memory=4), Broyden(memory=1), NewtonKrylov(inner=3)):
        with torch.no_grad():
            stop = Stop(rtol=1e-6, max_evals=3000)
            f, start = PROBLEMS[1].on(torch.float64), problem.start(torch.float64)
            assert solve(f, start, solver, stop).converged.all(), solver


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


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Broyden(memory=3)], ids=str)
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
            lambda z: z @ weight + x, torch.zeros_like(x), Broyden(memory=40), Stop(rtol=1e-9, atol=0, max_evals=20)
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
        (lambda: Broyden(memory=0), "at least 1"),
        (lambda: NewtonKrylov(inner=0), "at least 1"),
        (lambda: NewtonKrylov(forcing=1), r"\(0, 1\)"),
        (lambda: Reversible(1.0), "not 1"),
    ],
)
def test_hyper_parameters_are_checked(solver, words):
    with pytest.raises(ValueError, match=words):
        solver()


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=lambda s: type(s).__name__)
def test_a_window_in_bfloat16_takes_less_memory_and_few_more_evaluations(solver):
    factor, offset = torch.linspace(0.5, 0.9, 4096), torch.linspace(-1, 1, 4096)
    peaks, evals = [], []
    for one in (solver, dataclasses.replace(solver, half=True)):
        with PeakMemory() as memory, torch.no_grad():
            solution = solve(lambda z: torch.addcmul(offset, z, factor), torch.zeros(2, 4096), one, Stop(rtol=1e-5))
        assert solution.converged.all()
        peaks.append(memory.peak)
        evals.append(solution.evals)
    # Half of the 10 and 21 states that are kept, less one that is read at a time.
    assert (peaks[0] - peaks[1]) / (2 * 4096 * 4) >= {Anderson: 4, Broyden: 8.5}[type(solver)]
    assert evals[1] <= evals[0] + 3
