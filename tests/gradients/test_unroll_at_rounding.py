"""The gradient of ``Unroll`` where the residuals of a solve are rounding errors."""

import itertools
import warnings

import pytest
import torch

from equilibria import (
    Anderson,
    Broyden,
    ConvergenceWarning,
    NewtonKrylov,
    Picard,
    Reversible,
    Stop,
    Unroll,
    fixed_point,
)
from slow_cases import one_in

SECANT = [Anderson(), Anderson(ridge=0), Anderson(window=20), Broyden(), Broyden(rank=5)]
PAST = [Stop(rtol=0, max_evals=61, best=False), Stop(rtol=0, max_evals=101), Stop(rtol=1e-15, max_evals=61)]


def problem(*, size, batch=3):
    """Weight, input, cotangent, the solution of z = tanh(W z + x) and the gradient of wᵀz, all in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = draw(size, size)
    weight = (0.6 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
    x, w = draw(batch, size), draw(batch, size)
    z = torch.zeros_like(x)
    for _ in range(150):
        z = torch.tanh(z @ weight.mT + x)
    return weight.detach(), x, w, z.detach(), torch.autograd.grad((z * w).sum(), weight)[0]


def off(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("size", "solver", "stop"), one_in(4, itertools.product((3, 4, 10), SECANT, PAST)))
def test_steps_beyond_convergence_do_not_spoil_the_gradient(size, solver, stop):
    weight, x, w, _, expected = problem(size=size)
    given = weight.float().requires_grad_()
    solution = fixed_point(
        lambda z: torch.tanh(z @ given.mT + x.float()),
        torch.zeros_like(x.float()),
        solver=solver,
        stop=stop,
        gradient=Unroll(),
        on_failure="ignore",
    )
    (solution.z * w.float()).sum().backward()
    assert off(given.grad, expected) < 1e-3


@pytest.mark.parametrize("solver", SECANT, ids=str)
def test_the_same_for_a_state_of_two_dtypes(solver):
    weight, x, w, _, expected = problem(size=10)
    weight.requires_grad_()

    def f(z):
        value = torch.tanh(torch.cat([z["a"].double(), z["b"]], dim=1) @ weight.mT + x)
        return {"a": value[:, :4].float(), "b": value[:, 4:]}

    start = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 6, dtype=torch.float64)}
    solution = fixed_point(f, start, solver=solver, stop=PAST[0], gradient=Unroll())
    (torch.cat([solution.z["a"], solution.z["b"]], dim=1) * w).sum().backward()
    assert off(weight.grad, expected) < 1e-3


@pytest.mark.parametrize("solver", SECANT, ids=str)
def test_derivatives_of_higher_order_and_forward_mode_are_not_spoilt_either(solver):
    weight, x, w, _, expected = problem(size=10)
    direction = torch.ones_like(weight)

    def loss(weight, *, solver, dtype):
        f = lambda z: torch.tanh(z @ weight.mT + x.to(dtype))  # noqa: E731
        z0 = torch.zeros_like(x, dtype=dtype)
        return (fixed_point(f, z0, solver=solver, stop=PAST[0], gradient=Unroll()).z * w.to(dtype)).sum()

    def products(solver, dtype):
        given = weight.to(dtype)
        of = lambda weight: loss(weight, solver=solver, dtype=dtype)  # noqa: E731
        second = torch.func.jvp(torch.func.grad(of), (given,), (direction.to(dtype),))[1]
        return torch.func.jvp(of, (given,), (direction.to(dtype),))[1], second

    first, second = products(solver, torch.float32)
    assert off(first, (expected * direction).sum()) < 1e-4
    assert off(second, products(Picard(), torch.float64)[1]) < 1e-3


def test_a_sample_at_the_level_of_rounding_leaves_the_others_as_they_are():
    rates = torch.tensor([[0.1], [0.9]], dtype=torch.float64) * torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(
        lambda z: rates * z + x, torch.zeros(2, 3, dtype=torch.float64), stop=PAST[0], gradient=Unroll()
    )
    (gradient,) = torch.autograd.grad(solution.z.sum(), x)
    assert off(gradient, 1 / (1 - rates)) < 1e-9


@pytest.mark.parametrize("solver", [*SECANT, Picard(), Reversible(), NewtonKrylov()], ids=str)
@pytest.mark.parametrize("best", [True, False])
def test_a_start_at_the_level_of_rounding_is_right_or_heard(solver, best):
    weight, x, w, z, _ = problem(size=10)
    x = x.clone().requires_grad_()
    jacobian = (1 - z**2)[:, :, None] * weight
    inverse = torch.linalg.inv(torch.eye(10, dtype=torch.float64) - jacobian)
    expected = (w[:, None, :] @ inverse)[:, 0] * (1 - z**2)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", ConvergenceWarning)
        solution = fixed_point(
            lambda z: torch.tanh(z @ weight.mT + x),
            z,
            solver=solver,
            stop=Stop(rtol=0, max_evals=61, best=best),
            gradient=Unroll(),
        )
    (gradient,) = (
        torch.autograd.grad((solution.z * w).sum(), x, allow_unused=True) if solution.z.requires_grad else (None,)
    )
    right = gradient is not None and off(gradient, expected) < 1e-6
    assert right or any("began at the level of rounding" in str(warning.message) for warning in heard)
    if isinstance(solver, Picard | Reversible) and not best:
        assert right
        assert not [warning for warning in heard if warning.category is ConvergenceWarning]


@pytest.mark.parametrize("size", [3, 8])
def test_singular_normal_equations_have_a_finite_gradient(size):
    # Only one coordinate moves, so that the differences of the window are dependent while the residual is large.
    x = torch.ones(1, size, dtype=torch.float64, requires_grad=True)
    only = torch.eye(size, dtype=torch.float64)[0]
    solution = fixed_point(
        lambda z: 0.9 * torch.cos(z) * only * x,
        torch.zeros(1, size, dtype=torch.float64),
        solver=Anderson(ridge=0),
        stop=Stop(rtol=1e-12, max_evals=60),
        gradient=Unroll(),
    )
    z = solution.z[0, 0].detach()
    expected = 0.9 * z.cos() / (1 + 0.9 * z.sin())
    assert off(torch.autograd.grad(solution.z.sum(), x)[0][0, 0], expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zeros_are_no_start_at_the_level_of_rounding(dtype):
    x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        fixed_point(lambda z: 0.5 * z + x, torch.zeros(2, 3, dtype=dtype), stop=PAST[0], gradient=Unroll())
