"""GradientSuite: the laws that every gradient rule must keep. It needs pytest."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from equilibria.core.failure import ConvergenceError, ConvergenceWarning
from equilibria.core.maps import as_map
from equilibria.core.solve import Solution
from equilibria.core.state import State
from equilibria.core.stop import OnFailure, Status, Stop
from equilibria.core.trees import map_tensors, tensors_in
from equilibria.fixed_point import Method
from equilibria.stability import check_gradient
from equilibria.testing.problems import TreeProblem, tanh_map


class GradientSuite:
    """Inherit it in a class ``TestMine`` and supply ``make``: pytest then runs every law on the rule.

    ``class TestMine(GradientSuite): make = lambda self: Method(Anderson(), TIGHT, Mine())``
    """

    accuracy: ClassVar[float] = 1e-9
    """Largest relative error of the gradient against a long unroll; inf for a rough rule."""
    twice: ClassVar[bool | None] = False
    """True for a rule with second derivatives; False if they must be an error; None if nothing is promised."""
    twice_accuracy: ClassVar[float] = 1e-9
    """Largest relative error of the second derivative, for a rule with ``twice = True``."""
    leaves_no_graph: ClassVar[bool] = True
    """False for a solver that itself needs derivatives of f, and keeps their graph."""

    def make(self) -> Method:
        """The rule with a solver and a tight stop that suit it, as a ``Method``."""
        raise NotImplementedError

    def _run(
        self,
        f: Callable[[State], State],
        z0: State,
        stop: Stop | None = None,
        *,
        on_failure: OnFailure = "ignore",
    ) -> Solution:
        method = self.make()
        stop = method.stop if stop is None else stop
        return dataclasses.replace(method, stop=stop, on_failure=on_failure).run(as_map(f), z0)

    def test_equals_a_long_unroll(self) -> None:
        """The gradient for a state of one tensor."""
        weight, x, f = tanh_map()
        self._check_against_unroll(f, torch.zeros_like(x), [weight, x])

    def test_equals_a_long_unroll_on_a_tree(self) -> None:
        """The gradient for a state of three tensors of different shapes."""
        f, z0, tensors = _tree()
        self._check_against_unroll(f, z0, tensors)

    def _check_against_unroll(self, f: Callable[[State], State], z0: State, tensors: list[Tensor]) -> None:
        method = self.make()
        check = check_gradient(
            f, z0, tensors, gradient=method.gradient, solver=method.solver, stop=method.stop, steps=120
        )
        assert check.unroll_residual < 1e-12
        assert check.relative_error < min(self.accuracy, 1.0)
        if self.accuracy < 1:
            assert max(check.each) < 10 * self.accuracy

    def test_gradcheck(self) -> None:
        """Finite differences agree, for a tensor and for a tree."""
        if self.accuracy > 1e-8:
            pytest.skip("the rule is not exact to the accuracy of finite differences")
        weight, x, _ = tanh_map(n=2, batch=2, gain=0.5)  # each number costs solves
        start = torch.zeros_like(x)
        assert torch.autograd.gradcheck(
            lambda w, x: self._run(lambda z: torch.tanh(z @ w.mT + x), start).z, (weight, x)
        )
        problem = TreeProblem.make(batch=1)
        names, shapes = list(problem.weights), [weight.shape for weight in problem.weights.values()]

        def loss(numbers: Tensor) -> Tensor:
            pieces = numbers.split([shape.numel() for shape in shapes])
            weights = {name: p.view(shape) for name, p, shape in zip(names, pieces, shapes, strict=True)}
            leaves = tensors_in(self._run(problem.mapped(weights, problem.x), problem.start()).z)
            return torch.stack([leaf.square().sum() + leaf.sum() for leaf in leaves]).sum()

        numbers = torch.cat([weight.flatten() for weight in problem.weights.values()]).requires_grad_()
        assert torch.autograd.gradcheck(loss, (numbers,), fast_mode=True)

    def test_mixed_dtypes_are_near_float64(self) -> None:
        """Leaves of float32 and bfloat16 give a value and a gradient near those of float64."""
        exact, rough = (self._of_mixed(mixed=mixed) for mixed in (False, True))
        if exact is None or rough is None:
            pytest.skip("the rule refuses these dtypes")
        for a, b in zip(exact, rough, strict=True):
            assert float((a - b).norm() / a.norm()) < 0.05

    def _of_mixed(self, *, mixed: bool) -> list[Tensor] | None:
        problem = TreeProblem.make()
        dtypes = {"fine": torch.float32, "coarse": torch.bfloat16, "token": torch.float32} if mixed else {}
        dtype = torch.float32 if mixed else torch.float64
        weights = {name: w.to(dtype).requires_grad_() for name, w in problem.weights.items()}
        x = {name: value.to(dtype) for name, value in problem.x.items()}
        start = {name: value.to(dtypes.get(name, torch.float64)) for name, value in problem.start().items()}
        with contextlib.suppress(ValueError):
            z = self._run(problem.mapped(weights, x), start, Stop(rtol=1e-2, atol=0, max_evals=15)).z
            assert not mixed or {name: leaf.dtype for name, leaf in z.items()} == dtypes
            loss = sum(leaf.double().square().sum() for leaf in z.values())
            found = torch.autograd.grad(loss, list(weights.values()))  # pyright: ignore
            return [leaf.detach().double() for leaf in z.values()] + [g.double() for g in found]
        return None

    def test_has_a_gradient_converged_or_not(self) -> None:
        """The gradient after a few steps is finite and not zero."""
        weight, x, f = tanh_map()
        for stop in (Stop(rtol=0, atol=0, max_evals=5), Stop(rtol=0.5, max_evals=9)):
            z = self._run(f, torch.zeros_like(x), stop).z
            (g,) = torch.autograd.grad(z.sum(), weight)
            assert g.isfinite().all()
            assert g.abs().max() > 0

    def test_without_gradients_nothing_is_tracked(self) -> None:
        """Under ``no_grad`` the value is the same and has no graph."""
        _, x, f = tanh_map()
        with torch.no_grad():
            solution = self._run(f, torch.zeros_like(x))
        assert not solution.z.requires_grad
        tracked = self._run(f, torch.zeros_like(x))
        assert_close(solution.z, tracked.z.detach(), rtol=0, atol=1e-11)

    def test_repeated_backward_and_two_forwards_before_one_backward(self) -> None:
        """They work as with any operation of PyTorch."""
        weight, x, f = tanh_map()
        z = self._run(f, torch.zeros_like(x)).z
        first = torch.autograd.grad(z.sum(), weight, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(z.sum(), weight)[0])

        def other(z: Tensor) -> Tensor:
            return f(0.5 * z)

        both = self._run(f, torch.zeros_like(x)).z.sum() + self._run(other, x).z.sum()
        both.backward()
        separate = torch.autograd.grad(self._run(other, x).z.sum(), weight)[0]
        assert weight.grad is not None
        assert_close(weight.grad, first + separate)
        with pytest.raises(RuntimeError, match="second time"):
            z.sum().backward()

    def test_leaves_no_graph_behind(self) -> None:
        """Activations are released by reference counting alone: a cycle would keep them until the collector runs."""
        if not self.leaves_no_graph:
            pytest.skip("the solver differentiates f itself")
        _, x, f = tanh_map()
        alive: list[Any] = []
        with _without_collector():
            solution = self._run(lambda z: _Watched.apply(f(z), alive), torch.zeros_like(x))
            solution.z.sum().backward()
            del solution
            assert alive
            assert all(sentinel() is None for sentinel in alive)

    def test_a_second_derivative_is_right_or_an_error(self) -> None:
        """This holds on every path: autograd skips nodes that do not lead to the requested inputs."""
        if self.twice is None:
            pytest.skip("the method promises nothing about second derivatives")
        weight, x, f = tanh_map()
        z = self._run(f, torch.zeros_like(x)).z
        (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        penalty = g.square().sum()
        if self.twice:
            found = torch.autograd.grad(penalty, [weight, x])
            z = torch.zeros_like(x)
            for _ in range(150):
                z = f(z)
            (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
            for a, b in zip(found, torch.autograd.grad(g.square().sum(), [weight, x]), strict=True):
                assert float((a - b).norm() / b.norm()) < self.twice_accuracy
            return
        refused = "cannot be differentiated again"
        with pytest.raises(RuntimeError, match=refused):
            torch.autograd.grad(penalty, weight, retain_graph=True)
        with pytest.raises(RuntimeError, match=refused):
            penalty.backward(inputs=[weight], retain_graph=True)
        with pytest.raises(RuntimeError, match=refused):
            penalty.backward()

    def test_a_failure_is_heard(self) -> None:
        """A forward solve without enough budget warns or raises, as ``on_failure`` says."""
        _, x, f = tanh_map()
        stop = Stop(rtol=1e-12, max_evals=5)
        with pytest.warns(ConvergenceWarning, match="forward solve: 0 of 3 samples converged"):
            self._run(f, torch.zeros_like(x), stop, on_failure="warn")
        with pytest.raises(ConvergenceError, match="forward solve: 0 of 3 samples converged"):
            self._run(f, torch.zeros_like(x), stop, on_failure="raise")

    def test_a_nan_sample_is_reported_and_contained(self) -> None:
        """The status of the sample is NONFINITE, and the other samples stay finite."""
        _, x, f = tanh_map()
        x.data[1] = torch.nan
        solution = self._run(f, torch.zeros_like(x))
        assert solution.status[1] == Status.NONFINITE
        assert solution.z[[0, 2]].isfinite().all()

    def test_keeps_the_settings_of_the_method(self) -> None:
        """Coupled samples are one problem, with the gradient of a long unroll, and the iterates are kept."""
        weight, x, f = tanh_map(gain=0.5)

        def mixed(z: Tensor) -> Tensor:
            return f(z + 0.1 * z.mean(dim=0))

        method = dataclasses.replace(self.make(), coupled=True, keep=(1, 2), on_failure="ignore")
        solution, settings = method.run(as_map(mixed), torch.zeros_like(x)), ("solver", "stop", "gradient", "coupled")
        assert solution.status.shape == solution.residual.shape == (1,)
        assert [state.shape for state in solution.iterates] == [x.shape, x.shape]
        given = {name: getattr(method, name) for name in settings}
        check = check_gradient(mixed, torch.zeros_like(x), [weight, x], **given, steps=150)
        assert check.relative_error < min(self.accuracy, 1.0)

    def test_is_a_value(self) -> None:
        """It can be compared, copied and pickled."""
        rule = self.make().gradient
        assert copy.deepcopy(rule) == rule == pickle.loads(pickle.dumps(rule))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_on_a_gpu_as_on_the_cpu(self) -> None:
        """The gradients agree."""
        weight, x, f = tanh_map()
        (expected,) = torch.autograd.grad(self._run(f, torch.zeros_like(x)).z.sin().sum(), weight)
        w, y = (t.detach().cuda().requires_grad_() for t in (weight, x))
        z = self._run(lambda z: torch.tanh(z @ w.mT + y), torch.zeros_like(y)).z
        (found,) = torch.autograd.grad(z.sin().sum(), w)
        assert float((found.cpu() - expected).norm() / expected.norm()) < 1e-6

    def test_channels_last_survives(self) -> None:
        """A state keeps the order of its axes in memory, and its gradient is that of the contiguous state."""
        weight = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
        weight.requires_grad_()
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = []
        for form in (torch.contiguous_format, torch.channels_last):
            image = x.clone(memory_format=form)

            def f(z: Tensor, image: Tensor = image) -> Tensor:
                return torch.tanh(torch.einsum("mn,bnhw->bmhw", weight, z) + image)

            z = self._run(f, torch.zeros_like(image)).z
            assert z.is_contiguous(memory_format=form)
            found.append((z.detach(), torch.autograd.grad(z.square().sum(), weight)[0]))
        for a, b in zip(*found, strict=True):
            assert_close(a.contiguous(), b.contiguous(), rtol=1e-7, atol=1e-9)


def _tree() -> tuple[Callable[[State], State], State, list[Tensor]]:
    problem = TreeProblem.make(batch=2)
    weights = {name: w.clone().requires_grad_() for name, w in problem.weights.items()}
    x = map_tensors(lambda leaf: leaf.clone().requires_grad_(), problem.x)
    return problem.mapped(weights, x), problem.start(), [*weights.values(), *x.values()]


class _Sentinel:
    """An object that lives as long as the graph."""


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, alive: list[Any]) -> Tensor:
        ctx.sentinel = _Sentinel()
        alive.append(weakref.ref(ctx.sentinel))
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
