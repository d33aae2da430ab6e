"""The problems of two other libraries' test suites, written again from their mathematics: jaxopt's and optimistix's.

jaxopt: fixed-point iteration, Anderson acceleration, its wrapper around optimisers, implicit differentiation.
optimistix: fixed points of trees, most of them single steps of implicit methods for differential equations. Their
states have no batch axis: ``coupled=True``. docs/evidence/reliability.md lists what has no counterpart here, and why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from equilibria import Anderson, Broyden, Implicit, NewtonKrylov, Picard, Solver, Stop, Unroll, fixed_point, implicit

TIGHT = Stop(rtol=1e-11, max_evals=2000)
EVERY = (Picard(), Anderson(), Broyden(), NewtonKrylov())
QUASI_NEWTON = EVERY[1:]


def numbers(*shape: int, seed: int = 0, low: float | None = None) -> Tensor:
    """Normal numbers, or uniform ones from [low, 1)."""
    generator = torch.Generator().manual_seed(seed)
    if low is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return low + (1 - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclasses.dataclass
class Problem:
    """z = f(z, *operands), one problem whose leaves have any shape."""

    name: str
    f: Callable[..., Any]
    z0: Any
    operands: tuple[Tensor, ...] = ()
    exact: Any = None
    """The solution, if it is known."""
    solvers: tuple[Solver, ...] = EVERY
    stop: Stop = TIGHT
    scale: float = 1.0
    """Numbers below this times the accuracy count as 0."""

    def solve(self, solver: Solver, operands: tuple[Tensor, ...] | None = None, **choices: Any) -> Any:
        """The solution; it has to converge."""
        own = self.operands if operands is None else operands
        given = {"stop": self.stop, "gradient": Implicit(stop=TIGHT), "on_failure": "raise", "coupled": True} | choices
        return fixed_point(self.f, self.z0, *own, solver=solver, **given)


def each(function: Callable[..., Tensor], *trees: Any) -> Any:
    return pytree.tree_map(function, *trees)


# jaxopt: fixed-point iteration and Anderson acceleration


def contraction(size: int) -> tuple[Tensor, Tensor]:
    """A symmetric matrix of spectral radius just below 1/2, and a right-hand side."""
    matrix = numbers(size, size, low=-1.0)
    matrix = matrix + matrix.mT
    return matrix / (2 * torch.linalg.eigvalsh(matrix).abs().max() + 1e-4), numbers(size, seed=1, low=0.0)


def affine(name: str, size: int) -> Problem:
    matrix, b = contraction(size)
    exact = torch.linalg.solve(torch.eye(size).double() - matrix, b)
    return Problem(name, lambda x, m, b: m @ x + b, torch.zeros(size).double(), (matrix, b), exact)


def rotation() -> Problem:
    """Rotations about a centre by seven angles: no contraction, every eigenvalue has modulus 1."""
    angles = math.pi / vector(2, 3, 4, 5, 6, 1.27, 1.73)
    blocks = [torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]], dtype=torch.float64) for a in angles]
    matrix, centre = torch.block_diag(*blocks), torch.arange(1, 15).double()
    solvers = (Anderson(window=15), Broyden(), NewtonKrylov(inner=14))
    z0 = numbers(14, low=0.0)
    return Problem("rotation", lambda x, c: matrix @ (x - c) + c, z0, (centre,), centre, solvers)


JAXOPT = [
    Problem(
        "geometric decay",
        lambda x: vector(0.9, 0.99, 0.999) * x,
        vector(1.0, 0.4, -0.2),
        exact=torch.zeros(3).double(),
        stop=Stop(rtol=0, atol=1e-5, max_evals=8000),
        scale=1e8,  # a residual of 1e-5 is an error of 1e-2 where the rate is 0.999
    ),
    Problem(
        "a sine and a cube",
        lambda x: (x[0].sin() * x[0].square(), x[1] ** 3),
        (vector(0.6, 0.0, -0.1), vector(0.7, 0.5)[:, None]),
        exact=(torch.zeros(3).double(), torch.zeros(2, 1).double()),
        solvers=EVERY[:3],  # Newton's method goes to another fixed point, at 15.64
    ),
    Problem(
        "a sine, a cube and a change of sign",
        lambda x: (x[0].sin() * x[0].square(), (x[1][0] ** 3, -x[1][1])),
        (vector(0.6, 0.0, -0.1), (vector(0.7, 0.5)[:, None], vector(-1.0, 0.0, 2.0, -0.4)[None] / 3)),
        exact=(torch.zeros(3).double(), (torch.zeros(2, 1).double(), torch.zeros(1, 4).double())),
        solvers=EVERY[1:3],  # plain iteration changes the sign for ever, and Newton's method goes elsewhere
        stop=Stop(rtol=0, atol=1e-11, max_evals=500),
    ),
    Problem(
        "cosines",  # the second has slope −1 at its fixed point π/2
        lambda x, theta: x.cos() + theta,
        vector(0.3, math.pi / 4),
        (vector(0.0, math.pi / 2),),
        exact=vector(0.7390851332151607, math.pi / 2),
        solvers=QUASI_NEWTON,
        scale=1e4,
    ),
    Problem("a number", lambda x: 0.5 * x + 0.5, vector(0.0)[0], exact=vector(1.0)[0]),
    Problem(
        "a flat landscape",
        lambda x, theta: theta * x,
        vector(1.0, -0.5),
        (vector(0.05, 0.2),),
        exact=torch.zeros(2).double(),
    ),
    affine("affine, 200 unknowns", 200),
    affine("affine, 10 unknowns", 10),
    rotation(),
]


# optimistix: trees, and steps of implicit methods


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def like(tree: Any, rows: Tensor) -> Any:
    leaves, spec = pytree.tree_flatten(tree)
    parts = rows.split([leaf.numel() for leaf in leaves])
    return pytree.tree_unflatten([part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)], spec)


def on_vectors(f: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function of the whole state as one vector, as a function of a tree."""
    return lambda tree, *operands: like(tree, f(flat(tree), *operands))


def perceptron(y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return 0.1 * (w2 @ softplus(w1 @ y + b1) + b2)


def robertson(y: Tensor, k1: Tensor, k2: Tensor, k3: Tensor) -> Tensor:
    """Three reacting substances; rates from 0.04 to 3e7."""
    slow, fast, back = k1 * y[0], k2 * y[1].square(), k3 * y[1] * y[2]
    return torch.stack([back - slow, slow - fast - back, fast])


def midpoint(f: Callable[..., Tensor], dt: float, unknown: str) -> Callable[..., Tensor]:
    """One step of the implicit midpoint rule from y0 = 0, in three forms: the new value, the slope, the increment."""
    return {
        "value": lambda y, *args: dt * f(0.5 * y, *args),
        "slope": lambda y, *args: f(dt * y, *args),
        "increment": lambda y, *args: dt * f(y, *args),
    }[unknown]


def heat(y: Tensor, factor: Tensor) -> Tensor:
    """A Crank–Nicolson step of dy/dt = (1 − y)·y from y0 = x² on [−1, 1]: what the suite's heat equation comes to."""
    y0 = torch.linspace(-1, 1, 100, dtype=torch.float64).square()
    return factor * (y0 + 0.5 * ((1 - y) * y + (1 - y0) * y0))


TREE = ({"a": 0.5 * torch.ones(3, 2, 4).double()}, 0.5 * torch.ones(4).double())
SIZE = 28
SUBSTANCES = (torch.ones(2).double(), {"b": vector(1.0)[0]})
WEIGHTS = (0.3 * numbers(8, SIZE), numbers(8, seed=1), 0.3 * numbers(SIZE, 8, seed=2), numbers(SIZE, seed=3))
RATES = (vector(0.04)[0], vector(3e7)[0], vector(1e4)[0])
OPTIMISTIX = [
    Problem("cosine", lambda y, c: each(lambda x: torch.cos(c * x), y), TREE, (vector(1.0)[0],)),
    Problem("exponential", lambda y, c: each(lambda x: torch.exp(-c * x), y), TREE, (vector(1.0)[0],)),
    Problem("perceptron", on_vectors(perceptron), TREE, WEIGHTS),
    Problem("reaction", heat, torch.ones(100).double(), (vector(1.0)[0],)),
    *[
        Problem(
            f"linear, {unknown}",
            on_vectors(midpoint(lambda y, matrix: matrix @ y, 1 / 16, unknown)),
            TREE,
            (numbers(SIZE, SIZE, seed=19),),
            exact=each(torch.zeros_like, TREE),
        )
        for unknown in ("value", "slope", "increment")
    ],
    *[
        Problem(f"Robertson, {unknown}", on_vectors(midpoint(robertson, 1e-8, unknown)), SUBSTANCES, RATES, exact=exact)
        for unknown, exact in [
            ("value", each(torch.zeros_like, SUBSTANCES)),
            ("slope", each(torch.zeros_like, SUBSTANCES)),
            ("increment", each(torch.zeros_like, SUBSTANCES)),
        ]
    ],
]
PROBLEMS = JAXOPT + OPTIMISTIX
PAIRS = [
    pytest.param(problem, solver, id=f"{problem.name}-{type(solver).__name__}")
    for problem in PROBLEMS
    for solver in problem.solvers
]


@pytest.mark.parametrize(("problem", "solver"), PAIRS)
def test_the_fixed_point_is_found(problem, solver):
    with torch.no_grad():
        found = problem.solve(solver).z
        again = problem.f(found, *problem.operands)
    assert_close(again, found, rtol=1e-6, atol=max(1e-7, 1.1e-13 * problem.scale))
    if problem.exact is not None:
        assert_close(found, problem.exact, rtol=1e-8, atol=1e-10 * problem.scale)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.operands], ids=lambda p: p.name)
def test_derivatives_are_those_of_finite_differences(problem):
    """One direction of all operands, forwards and backwards, against central differences."""
    solver, h = problem.solvers[-1] if problem.name == "rotation" else Anderson(), 1e-5
    directions = [numbers(*x.shape, seed=7 + i) * x.abs().clamp(min=1e-9) for i, x in enumerate(problem.operands)]
    weights = each(lambda leaf: numbers(*leaf.shape, seed=11), problem.z0)

    def value(*operands: Tensor) -> Tensor:
        z = problem.solve(solver, operands).z
        return sum((w * leaf).sum() for w, leaf in zip(*map(pytree.tree_leaves, (weights, z)), strict=True))

    moved = [[x + s * h * d for x, d in zip(problem.operands, directions, strict=True)] for s in (1, -1)]
    with torch.no_grad():
        expected = (value(*moved[0]) - value(*moved[1])) / (2 * h)
    operands = [x.clone().requires_grad_() for x in problem.operands]
    gradients = torch.autograd.grad(value(*operands), operands)
    backwards = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    _, forwards = torch.func.jvp(value, problem.operands, tuple(directions))
    assert_close(backwards, expected, rtol=1e-6, atol=1e-8)
    assert_close(forwards, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", [Implicit(stop=TIGHT), Unroll()], ids=["implicit", "unrolled"])
@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=["Picard", "Anderson"])
def test_the_gradient_of_a_cosine(rule, solver):
    """x = cos x + θ, with dx/dθ = 1/(1 + sin x)."""
    theta = vector(0.0, 0.5).requires_grad_()
    x = fixed_point(
        lambda x, t: x.cos() + t,
        vector(0.0, math.pi / 4),
        theta,
        solver=solver,
        stop=TIGHT,
        gradient=rule,
        coupled=True,
        on_failure="ignore",  # unrolled from close by, the gradient lags behind the solution
    ).z
    (gradient,) = torch.autograd.grad(x.sum(), theta)
    assert_close(gradient, 1 / (1 + x.detach().sin()), rtol=1e-6, atol=0)


# jaxopt: implicit differentiation of a solution that something else has found


def regression(samples: int, features: int) -> tuple[Tensor, Tensor]:
    x = numbers(samples, features, seed=4)
    return x, x @ (10 * numbers(features, seed=5).abs()) + 0.1 * numbers(samples, seed=6)


def ridge_map(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A step of gradient descent on ½·mean (xw − y)² + ½·λ‖w‖²; its length stays below 2 over the curvature."""
    gradient = x.mT @ (x @ w - y) / len(y) + penalty * w
    return w - gradient / (penalty + 1 + x.square().sum() / len(y)).detach()


@implicit(ridge_map, gradient=Implicit(stop=TIGHT), stop=Stop(rtol=1e-9), coupled=True)
def ridge(penalty: Tensor, x: Tensor, y: Tensor, *, scaled: bool = True) -> Tensor:
    """In closed form, without any derivative of its own; the keyword is the procedure's."""
    square = x.mT @ x + penalty * (len(y) if scaled else 1) * torch.eye(x.shape[1]).double()
    return torch.linalg.solve(square, x.mT @ y)


def test_ridge_regression_has_the_derivatives_of_its_closed_form():
    (x, y), penalty = regression(10, 3), vector(5.0)[0]

    def closed(penalty: Tensor) -> Tensor:
        return torch.linalg.solve(x.mT @ x + penalty * len(y) * torch.eye(3).double(), x.mT @ y)

    expected = torch.func.jacfwd(closed)(penalty)
    assert_close(ridge(penalty, x, y, scaled=True), closed(penalty))
    assert_close(torch.func.jacrev(lambda p: ridge(p, x, y))(penalty), expected)
    assert_close(torch.func.jvp(lambda p: ridge(p, x, y), (penalty,), (torch.ones_like(penalty),))[1], expected)
    single = penalty.clone().requires_grad_()
    assert_close(torch.autograd.grad(ridge(single, x, y)[0], single)[0], expected[0])
    rows = [torch.autograd.grad(ridge(single, x, y) @ e, single)[0] for e in torch.eye(3).double()]
    assert_close(torch.stack(rows), expected)


# jaxopt: Anderson acceleration around the steps of optimisers


def lasso_step(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Proximal gradient descent (Daubechies, Defrise, De Mol 2004) on ½·mean (xw − y)² + λ‖w‖₁."""
    length = len(y) / torch.linalg.matrix_norm(x, 2).square()
    moved = w - length * (x.mT @ (x @ w - y)) / len(y)
    return moved.sign() * torch.relu(moved.abs() - length * penalty)


def lasso_sweep(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Every coordinate in turn, by the closed form of one."""
    columns = list(w.unbind())
    for i in range(len(columns)):
        rest = y - x @ torch.stack([c if j != i else torch.zeros_like(c) for j, c in enumerate(columns)])
        along, square = x[:, i] @ rest / len(y), x[:, i].square().mean()
        columns[i] = along.sign() * torch.relu(along.abs() - penalty) / square
    return torch.stack(columns)


@pytest.mark.parametrize("step", [lasso_step, lasso_sweep])
def test_the_lasso_is_solved_and_differentiated(step):
    """On its support the solution is that of a linear system: XᵀX w = Xᵀy − nλ·sign(w)."""
    (x, y), penalty = regression(100, 20), vector(10.0)[0].requires_grad_()
    solver = Anderson(window=15)
    z0 = torch.zeros(20).double()
    found = fixed_point(
        step, z0, penalty, x, y, solver=solver, stop=TIGHT, gradient=Implicit(stop=TIGHT), coupled=True
    ).z
    support = found.detach() != 0
    assert 0 < support.sum() < 20
    own, sign = x[:, support], found.detach()[support].sign()

    def closed(penalty: Tensor) -> Tensor:
        return torch.linalg.solve(own.mT @ own, own.mT @ y - len(y) * penalty * sign)

    assert_close(found[support], closed(penalty), rtol=1e-7, atol=1e-7)
    loss = (x @ found - y).square().mean()
    (gradient,) = torch.autograd.grad(loss, penalty)
    (expected,) = torch.autograd.grad((own @ closed(penalty) - y).square().mean(), penalty)
    assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_descent_with_momentum_is_accelerated(momentum):
    """Multiclass logistic regression with an intercept; the state holds weights, intercepts and their velocities."""
    x, labels = numbers(100, 20, seed=4), torch.randint(3, (100,), generator=torch.Generator().manual_seed(5))

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ w + b, labels) + 0.05 * w.square().sum()

    def step(state: Any) -> Any:
        (w, b), (v, c) = state
        gradients = torch.func.grad(loss, argnums=(0, 1))(w, b)
        v, c = momentum * v + gradients[0], momentum * c + gradients[1]
        return (w - 0.3 * v, b - 0.3 * c), (v, c)

    zeros = (torch.zeros(20, 3).double(), torch.zeros(3).double())
    stop, counts = Stop(rtol=1e-9, max_evals=5000), {}
    with torch.no_grad():
        for solver in (Picard(), Anderson()):
            found = fixed_point(step, (zeros, zeros), solver=solver, stop=stop, coupled=True, on_failure="raise")
            counts[type(solver).__name__] = found.evals
            gradients = torch.func.grad(loss, argnums=(0, 1))(*found.z[0])
            assert max(float(g.abs().max()) for g in gradients) < 1e-8
    assert counts["Anderson"] < counts["Picard"]
