"""SolverSuite: the laws that every solver must keep. It needs pytest."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

from equilibria.core.solve import solve
from equilibria.core.solver import Solver
from equilibria.core.state import State
from equilibria.core.stop import Status, Stop
from equilibria.core.trees import tensors_in
from equilibria.testing.problems import NAMES, Problem, flat, problems, same_rows

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class SolverSuite:
    """Inherit it in a class ``TestMine`` and supply ``make``: pytest then runs every law on the solver.

    ``class TestMine(SolverSuite): make = lambda self: Mine(damping=0.5)``
    """

    needs_contraction: ClassVar[bool] = False
    """True for a solver that converges only where plain iteration does."""
    pays_for_whole_steps: ClassVar[bool] = False
    """True for a solver that charges evaluations which it did not make (``Evaluator.forfeit``)."""

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

    def test_is_a_frozen_value(self) -> None:
        """It can be compared, copied and pickled, and not changed."""
        solver = self.make()
        assert dataclasses.replace(solver) == solver  # pyright: ignore
        assert copy.deepcopy(solver) == solver == pickle.loads(pickle.dumps(solver))
        with pytest.raises(dataclasses.FrozenInstanceError):
            solver.anything = 1  # pyright: ignore
