"""implicit(f): derivatives of a fixed point that an external procedure has found."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from equilibria import Anderson, ConvergenceError, ConvergenceWarning, Implicit, Neumann, Shine, Stop, Unroll, implicit

TIGHT = Stop(rtol=1e-12, max_evals=100)
RULE = Implicit(Anderson(), TIGHT)


def babylon(z, a):
    """A map whose fixed point is the square root of a."""
    return (z + a / z) / 2 + 0.3 * (a - z * z)


def newton(a, *, steps=30):
    z = torch.ones_like(a)
    for _ in range(steps):
        z = (z + a / z) / 2
    return z


@pytest.fixture
def a():
    return torch.tensor([[0.5, 1.0], [1.5, 0.7]], dtype=torch.float64, requires_grad=True)


def test_derivatives_of_every_order(a):
    root = implicit(babylon, gradient=RULE, stop=TIGHT)(newton)
    torch.testing.assert_close(root(a), a.sqrt())
    assert gradcheck(root, a, check_forward_ad=True)
    assert gradgradcheck(root, a)
    torch.testing.assert_close(
        torch.func.hessian(lambda a: root(a).sum())(a), torch.func.hessian(lambda a: a.sqrt().sum())(a)
    )
    many = torch.stack([a, 1.1 * a])
    torch.testing.assert_close(torch.func.vmap(root)(many), many.sqrt())


def test_other_rules(a):
    root = implicit(babylon, gradient=Neumann(80), stop=TIGHT)(newton)
    torch.testing.assert_close(torch.autograd.grad(root(a).sum(), a)[0], 0.5 / a.sqrt())


@pytest.mark.parametrize("rule", [Unroll(), Shine()], ids=lambda rule: type(rule).__name__)
def test_rules_that_need_a_solver_are_refused(rule):
    with pytest.raises(ValueError, match="no steps of a solver to differentiate"):
        implicit(babylon, gradient=rule)


def test_a_procedure_that_has_not_arrived_is_heard(a):
    root = implicit(babylon, gradient=RULE, stop=TIGHT)(newton)
    with pytest.warns(ConvergenceWarning, match="0 of 2 samples converged"):
        root(a, steps=1)
    with pytest.raises(ConvergenceError):
        implicit(babylon, gradient=RULE, stop=TIGHT, on_failure="raise")(newton)(a, steps=1)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: implicit(babylon, stop=1e-3), r"stop is 0.001; it must be a Stop"),
        (lambda: implicit(babylon, on_failure="stop"), "on_failure is one of"),
        (lambda: implicit(babylon, coupled="no"), "coupled is True or False"),
        (lambda: implicit(3), "f is int; it must be a function"),
    ],
)
def test_wrong_arguments_are_refused_before_a_procedure_is_decorated(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()
