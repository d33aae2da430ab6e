"""SolverSuite: the laws that every solver must keep. It needs pytest."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from equilibria.core.evaluator import Evaluator
from equilibria.core.gradient import GradientRule
from equilibria.core.solve import solve
from equilibria.core.solver import History, Iterate, Solver
from equilibria.core.state import State
from equilibria.core.stop import Status, Stop
from equilibria.core.trees import tensors_in
from equilibria.fixed_point import fixed_point
from equilibria.gradients.implicit import Implicit
from equilibria.gradients.unroll import Unroll
from equilibria.solvers.broyden import Broyden
from equilibria.testing.problems import NAMES, Divisible, Problem, flat, problems, rows_times, same_rows, tanh_map

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class SolverSuite:
    """Inherit it in a class ``TestMine`` and supply ``make``: pytest then runs every law on the solver.

    ``class TestMine(SolverSuite): make = lambda self: Mine(damping=0.5)``
    """

    needs_contraction: ClassVar[bool] = False
    """True for a solver that converges only where plain iteration does."""
    pays_for_whole_steps: ClassVar[bool] = False
    """True for a solver that charges evaluations which it did not make (``Evaluator.forfeit``)."""
    unrolls: ClassVar[bool] = True
    """False for a solver whose steps autograd cannot follow: back-propagation through them must then be an error."""

    def make(self) -> Solver:
        """The solver to be tested."""
        raise NotImplementedError

    def _problem(self, name: str) -> Problem:
        problem = problems()[name]
        if self.needs_contraction and not problem.contractive:
            pytest.skip("the solver needs a contraction")
        return problem

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_finds_the_known_fixed_point(self, name: str, dtype: torch.dtype) -> None:
        """The error meets the tolerance, and the reported residual is the true one."""
        problem, tolerance = self._problem(name), TOLERANCE[dtype]
        f, stop = problem.map(dtype), Stop(rtol=tolerance, atol=0, max_evals=400)
        with torch.no_grad():
            solution = solve(f, problem.start(dtype), self.make(), stop)
        assert solution.converged.all()
        fz, z = same_rows(f, solution.z)
        assert_close(flat(solution.fz), fz, rtol=1e-6, atol=tolerance)
        residual = (fz - z).norm(dim=1) / fz.norm(dim=1)
        assert (residual <= 1.01 * tolerance).all()
        assert_close(solution.residual, residual, rtol=1e-2, atol=1e-12)
        exact = flat(problem.exact)
        # |z - z*| <= |(I - J)^-1| |residual|, and the inverse is below 40 on all problems.
        assert (z.double() - exact).norm(dim=1).max() <= 40 * tolerance * exact.norm(dim=1).max()

    @pytest.mark.parametrize("name", NAMES)
    def test_a_sample_alone_is_as_in_a_batch(self, name: str) -> None:
        """The first, the fastest and the slowest one have the same answer and the same number of steps."""
        problem, stop, dtype = self._problem(name), Stop(rtol=1e-4, atol=0, max_evals=300), torch.float32
        self._alone_as_together(problem, stop, dtype, tolerance=1e-6)

    @pytest.mark.parametrize("budget", [9, 14, 23])
    def test_a_sample_alone_is_as_in_a_batch_when_the_budget_binds(self, budget: int) -> None:
        """No sample's budget depends on its batch."""
        problem, stop = problems()[NAMES[0]], Stop(rtol=1e-11, atol=0, max_evals=budget)
        self._alone_as_together(problem, stop, torch.float64, tolerance=1e-9)

    def _alone_as_together(self, problem: Problem, stop: Stop, dtype: torch.dtype, *, tolerance: float) -> None:
        with torch.no_grad():
            together = solve(problem.map(dtype), problem.start(dtype), self.make(), stop)
            for row in sorted({0, int(together.steps.argmin()), int(together.steps.argmax())}):
                alone = solve(problem.map(dtype, [row]), problem.start(dtype, [row]), self.make(), stop)
                assert alone.status.item() == together.status[row].item()
                assert alone.steps.item() == together.steps[row].item()
                assert_close(flat(alone.z)[0], flat(together.z)[row], rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
    def test_permutes_with_its_samples(self, name: str) -> None:
        """Permuted samples have permuted answers."""
        problem, stop = self._problem(name), Stop(rtol=1e-8, max_evals=200)
        order = list(range(problem.batch))[::-1]
        with torch.no_grad():
            plain = solve(problem.map(), problem.start(), self.make(), stop)
            permuted = solve(problem.map(rows=order), problem.start(rows=order), self.make(), stop)
        assert permuted.steps.tolist() == plain.steps[order].tolist()
        assert_close(flat(permuted.z), flat(plain.z)[order], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 11])
    def test_keeps_the_budget(self, budget: int) -> None:
        """Every evaluation is counted, and none is made beyond the budget."""
        problem, calls, solver = problems()[NAMES[1]], [], self.make()
        f = problem.map()

        def counted(z: State) -> State:
            calls.append(1)
            return f(z)

        with torch.no_grad():
            solution = solve(counted, problem.start(), solver, Stop(rtol=1e-12, atol=0, max_evals=budget))
        assert solution.evals == len(calls) <= budget
        if not self.pays_for_whole_steps:
            assert solution.evals > budget - solver.cost
        assert (solution.status == Status.BUDGET_SPENT).all()

    @pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
    def test_contains_a_nan(self, name: str) -> None:
        """A sample that is NaN leaves the bits of the others as they are."""
        problem, stop, dtype = self._problem(name), Stop(rtol=1e-5, max_evals=300), torch.float32
        others = [row for row in range(problem.batch) if row != 1]
        with torch.no_grad():
            good = solve(problem.map(dtype), problem.start(dtype), self.make(), stop)
            mixed = solve(problem.poisoned(1).map(dtype), problem.start(dtype), self.make(), stop)
        assert mixed.status[1] == Status.NONFINITE
        assert torch.equal(mixed.status[others], good.status[others])
        assert torch.equal(flat(mixed.z)[others], flat(good.z)[others])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
    def test_half_precision_states(self, name: str, dtype: torch.dtype) -> None:
        """They converge to the rounding of their dtype, and keep the dtype."""
        problem = self._problem(name)
        with torch.no_grad():
            solution = solve(problem.map(dtype), problem.start(dtype), self.make(), Stop(rtol=2e-2, max_evals=60))
        assert {leaf.dtype for leaf in tensors_in(solution.z)} == {dtype}
        assert solution.converged.all()

    @pytest.mark.parametrize("name", [NAMES[1], NAMES[3]])
    def test_a_start_at_the_solution_costs_one_evaluation(self, name: str) -> None:
        """It is recognised at once and not moved."""
        problem = self._problem(name)
        with torch.no_grad():
            solution = solve(problem.map(), problem.exact, self.make(), Stop(rtol=1e-6))
        assert solution.evals == 1
        assert (solution.steps == 0).all()

    @pytest.mark.parametrize("name", NAMES)
    def test_samples_that_leave_the_batch_change_nothing(self, name: str) -> None:
        """If samples leave the batch, the others have the results that they have in a batch from which none leaves."""
        problem, stop = self._problem(name), Stop(rtol=1e-7, atol=0, max_evals=300)
        with torch.no_grad():
            every, some = (
                solve(Divisible.of(problem), problem.start(), self.make(), stop, drop_converged=drop)
                for drop in (False, True)
            )
        assert some.steps.tolist() == every.steps.tolist()
        assert_close(flat(some.z), flat(every.z), rtol=1e-9, atol=1e-9)

    def test_samples_solved_in_blocks_are_as_in_one_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """``by_row`` is true only of a step that treats every sample by itself."""
        monkeypatch.setattr("equilibria.core.batch.BLOCK", 8)
        count = 10 * torch.get_num_threads()
        x, stop = torch.linspace(-2, 2, 2 * count).reshape(count, 2).double(), Stop(rtol=1e-7, max_evals=200)
        with torch.no_grad():
            blocks, whole = (
                solve(lambda z: 0.5 * z.cos() + x, torch.zeros_like(x), self.make(), stop, drop_converged=drop)
                for drop in (True, False)
            )
        assert blocks.steps.tolist() == whole.steps.tolist()
        assert_close(blocks.z, whole.z, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("width", [1, 2, 3, 5])
    def test_states_of_few_numbers(self, width: int) -> None:
        """A history may be longer than a state has numbers."""
        weight = 0.6 * torch.linalg.qr(torch.ones(width, width).tril().double())[0]
        x = torch.tensor([[1.0], [0.01], [-30.0]]).double() + torch.arange(width)
        with torch.no_grad():
            solution = solve(
                lambda z: rows_times(z, weight) + x, torch.zeros_like(x), self.make(), Stop(1e-9, max_evals=400)
            )
        assert solution.converged.all()
        exact = torch.linalg.solve(torch.eye(width).double() - weight, x.mT).mT
        assert_close(solution.z, exact, rtol=1e-7, atol=1e-7)

    def test_a_sample_without_residual_stays_finite(self) -> None:
        """Steps without tolerance also leave from a fixed point, where a quotient of residuals is 0/0."""
        slopes, x = torch.tensor([[0.5], [0.0], [0.7]]).double(), torch.tensor([[0.0], [1.0], [2.0]]).double()
        x = x * torch.arange(1, 7)
        with torch.no_grad():
            start, stop = torch.zeros_like(x), Stop(rtol=0, atol=0, max_evals=25, best=False)
            solution = solve(lambda z: slopes * z + x, start, self.make(), stop)
        assert (solution.status == Status.BUDGET_SPENT).all()
        assert solution.z.isfinite().all()
        assert solution.z[0].abs().max() < 1e-9

    def test_a_step_changes_no_number_that_it_is_given(self) -> None:
        """The start, z and f(z) have the same bits after the step: they may be the result."""
        problem = self._problem(NAMES[0])
        start, stop = problem.start(), Stop(rtol=1e-6, max_evals=40)
        with torch.no_grad():
            solve(problem.map(), start, _Watched(self.make()), stop)
        assert torch.equal(flat(start), flat(problem.start()))

    def test_the_same_bits_twice(self) -> None:
        """A solve depends on nothing but its arguments, and draws no random numbers."""
        problem, before = self._problem(NAMES[0]), torch.get_rng_state()
        with torch.no_grad():
            first, second = (solve(problem.map(), problem.start(), self.make(), Stop(1e-8)) for _ in range(2))
        assert torch.equal(flat(first.z), flat(second.z))
        assert torch.equal(before, torch.get_rng_state())

    def test_the_least_cost_of_a_step(self) -> None:
        """``cost`` evaluations after the first are enough for one step."""
        problem, solver = self._problem(NAMES[0]), self.make()
        with torch.no_grad():
            solution = solve(problem.map(), problem.start(), solver, Stop(1e-12, max_evals=1 + solver.cost))
        assert solution.evals == 1 + solver.cost
        assert (solution.steps == 1).all()

    def test_back_propagation_through_the_steps(self) -> None:
        """The gradient of the last iterate tends to the gradient of the fixed point, or is an error."""
        weight, x, f = tanh_map()
        start, stop = 0 * x, Stop(rtol=1e-10, atol=0, max_evals=400)

        def gradient(solver: Solver, rule: GradientRule) -> tuple[Tensor, ...]:
            z = fixed_point(f, start, solver=solver, stop=stop, gradient=rule, on_failure="ignore").z
            return torch.autograd.grad(z.square().sum(), (weight, x))

        if not self.unrolls:
            with pytest.raises(RuntimeError):
                gradient(self.make(), Unroll())
            return
        known = gradient(Broyden(), Implicit(stop=stop))
        for found, expected in zip(gradient(self.make(), Unroll()), known, strict=True):
            assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_is_a_frozen_value(self) -> None:
        """It can be compared, copied and pickled, and not changed."""
        solver = self.make()
        assert dataclasses.replace(solver) == solver  # pyright: ignore
        assert copy.deepcopy(solver) == solver == pickle.loads(pickle.dumps(solver))
        with pytest.raises(dataclasses.FrozenInstanceError):
            solver.anything = 1  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class _Watched(Solver):
    """A solver that fails if a step of the inner one changes z or f(z) in place."""

    inner: Solver

    def init(self, z: Tensor) -> History:
        return self.inner.init(z)

    def step(self, f: Evaluator, at: Iterate, history: History) -> tuple[Tensor, History]:
        before = at.z.clone(), at.fz.clone()
        following = self.inner.step(f, at, history)
        assert torch.equal(before[0], at.z), "the step changed z in place"
        assert torch.equal(before[1], at.fz), "the step changed f(z) in place"
        return following
