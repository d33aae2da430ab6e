"""An f that uses torch.func itself, as a step of gradient descent does, inside and outside of transforms.

Such an f was refused inside a transform, as a closure: the tensors that its own transforms make, around and out of its
operands, were taken for tensors that it had not been given.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from equilibria import Anderson, Implicit, Stack, Stop, Unroll, Unrolled, fixed_point
from slow_cases import one_in

TASKS, WIDTH = 3, 2
TIGHT = Stop(rtol=1e-13, max_evals=200)
EXACT = {"solver": Anderson(), "stop": TIGHT, "gradient": Implicit(Anderson(), TIGHT)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, PENALTY = draw(TASKS, 5, WIDTH), draw(TASKS, 5, seed=1), draw(WIDTH, seed=2)
START = torch.zeros(TASKS, WIDTH, dtype=torch.float64)


def loss(w, penalty, x, y):
    return (x @ w - y).cosh().log().mean() + 0.5 * (penalty.exp() * w * w).sum()


def descended(w, penalty, x, y):
    return w - 0.2 * grad(loss)(w, penalty, x, y)


def newton(w, penalty, x, y):
    return w - torch.linalg.inv(hessian(loss)(w, penalty, x, y)) @ grad(loss)(w, penalty, x, y)


def batched(step):
    return vmap(step, in_dims=(0, None, 0, 0))


def looped(w, penalty, x, y):
    return torch.stack([descended(a, penalty, b, c) for a, b, c in zip(w, x, y, strict=True)])


def moved(w, penalty, x, y):
    """The batch of the vmap inside comes in and goes out at other axes."""
    return vmap(descended, in_dims=(1, None, 1, 1), out_dims=1)(w.mT, penalty, x.transpose(0, 1), y.mT).mT


def solved(f):
    def outer(penalty):
        z = fixed_point(f, START, penalty, X, Y, **EXACT).z
        return z.pow(3).sum()

    return outer


def unrolled(penalty):
    z = START
    for _ in range(800):
        z = batched(descended)(z, penalty, X, Y)
    return z.pow(3).sum()


TRANSFORMS = {"grad": grad, "hessian": hessian, "jacrev": lambda f: jacrev(jacrev(f)), "jacfwd": jacfwd}


@functools.cache
def expected(transform):
    """The derivative of the unroll, which is that of every step."""
    return TRANSFORMS[transform](unrolled)(PENALTY)


STEPS = {"vmap": batched(descended), "newton": batched(newton), "loop": looped, "axes": moved}


@pytest.mark.parametrize(("transform", "step"), one_in(3, itertools.product(TRANSFORMS, STEPS)))
def test_f_may_use_transforms_inside_a_transform(transform, step):
    found = TRANSFORMS[transform](solved(STEPS[step]))(PENALTY)
    torch.testing.assert_close(found, expected(transform), rtol=1e-9, atol=1e-11)


def test_tasks_may_be_solved_under_vmap():
    def task(penalty, x, y):
        z = fixed_point(descended, START[0], penalty, x, y, coupled=True, **EXACT).z
        return z.pow(3).sum()

    each = vmap(hessian(task), in_dims=(None, 0, 0))(PENALTY, X, Y)
    torch.testing.assert_close(each.sum(0), expected("hessian"), rtol=1e-9, atol=1e-11)


def around(penalty):
    """The inner vmap wraps what f closes over, so that no operation of f sees it bare."""
    many = penalty.expand(TASKS, WIDTH)
    return lambda z, x, y: vmap(descended)(z, many, x, y)


def by_gradient(penalty):
    """The inner gradient is with respect to what f closes over."""
    return lambda z, x, y: torch.stack([grad(lambda p, w=w: (p * w.sin()).cosh().log().sum())(penalty) for w in z])


@pytest.mark.parametrize("closure", [around, by_gradient], ids=lambda f: f.__name__)
def test_a_closure_is_refused_although_f_uses_transforms(closure):
    def outer(penalty):
        return fixed_point(closure(penalty), START, X, Y, **EXACT).z.sum()

    for transform in (grad, jacrev, jacfwd, hessian):
        with pytest.raises(RuntimeError, match="pass it as an operand"):
            transform(outer)(PENALTY)
    with pytest.raises(RuntimeError, match="pass it as an operand"):
        vmap(outer)(torch.stack([PENALTY, PENALTY]))
    tracked = PENALTY.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="pass it as an operand"):
        grad(lambda x: fixed_point(closure(tracked), START, x, Y, **EXACT).z.sum())(X)


@pytest.mark.parametrize(
    "run",
    [
        lambda module, x: fixed_point(module, torch.zeros_like(x), x, gradient=Unroll(checkpoint=True)).z,
        lambda module, x: Unrolled(module, 3, checkpoint=True)(x).z,
        lambda module, x: Stack([module, module], checkpoint=True)(x).z,
    ],
    ids=["Unroll", "Unrolled", "Stack"],
)
def test_a_checkpoint_around_it_is_refused_in_a_sentence(run):
    """torch has none there, and said "Please open an issue with your use case"."""

    class Descent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, z, x):
            return 0.1 * grad(lambda y: self.linear(y).sin().sum())(z) + x

    module, x = Descent(), torch.ones(2, 4)
    with pytest.raises(RuntimeError, match=r"no checkpoints around these: leave checkpoint=True out, or use") as caught:
        run(module, x)
    assert "open an issue" not in str(caught.value)
    fixed_point(module, torch.zeros_like(x), x, gradient=Unroll()).z.sum().backward()
    assert module.linear.weight.grad.abs().sum() > 0
