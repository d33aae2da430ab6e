"""Derivatives of every kind through every rule: right to a stated tolerance, or refused with a message of our own."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from equilibria import (
    Anderson,
    Broyden,
    ConvergenceWarning,
    Equilibrium,
    Implicit,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Reversible,
    ReversibleGradient,
    Shine,
    Stop,
    Unroll,
    fixed_point,
)

TIGHT = Stop(rtol=1e-13, max_evals=100)
FIXED = Stop(rtol=0, max_evals=80, best=False)
RULES = {
    "Implicit": {"solver": Anderson(), "stop": TIGHT, "gradient": Implicit(Anderson(), TIGHT)},
    "Implicit-per-leaf": {
        "solver": Anderson(),
        "stop": Stop(rtol=1e-13, max_evals=100, per_leaf=True),
        "gradient": Implicit(Broyden(), Stop(rtol=1e-13, max_evals=100, per_leaf=True)),
    },
    "Neumann": {"solver": Anderson(), "stop": TIGHT, "gradient": Neumann(60)},
    "Phantom": {"solver": Anderson(), "stop": TIGHT, "gradient": Phantom(60)},
    "Shine": {"solver": Broyden(), "stop": TIGHT, "gradient": Shine()},
    "Unroll": {"solver": Picard(), "stop": FIXED, "gradient": Unroll()},
    "ReversibleGradient": {
        "solver": Reversible(0.5),
        "stop": Stop(rtol=0, max_evals=61, best=False),
        "gradient": ReversibleGradient(),
    },
}
TOLERANCE = {"Shine": 0.3, "ReversibleGradient": 1e-5}
"""Relative error; 1e-9 for other rules. 30 damped steps leave 1e-6. For Shine, only a direction, 1 − cosine."""


class Tensor:
    """A state of one tensor; coupled, every sample reads the mean of the batch."""

    def __init__(self, coupled):
        self.coupled = coupled

    def z0(self, x):
        return torch.zeros_like(x)

    def f(self, z, x, w):
        z = torch.tanh(0.5 * z @ w + x)
        return z + 0.2 * z.mean(0) if self.coupled else z

    def joined(self, z):
        return z


class Tree(Tensor):
    """A state of two tensors of different shapes."""

    def z0(self, x):
        return {"a": torch.zeros_like(x), "b": torch.zeros_like(x)[:, :2, None].expand(-1, -1, 2)}

    def f(self, z, x, w):
        a, b = z["a"], z["b"]
        mixed = 0.2 * b.mean(0).sum() if self.coupled else 0.2 * b.sum((1, 2))[:, None]
        return {"a": torch.tanh(0.5 * a @ w + x) + mixed, "b": 0.3 * torch.sin(b + a[:, :2, None] * x[:, 1:, None])}

    def joined(self, z):
        return torch.cat([z["a"], z["b"].flatten(1)], 1)


def unrolled(problem, x, w):
    z = problem.z0(x)
    for _ in range(120):
        z = problem.f(z, x, w)
    return problem.joined(z)


def through(problem, rule, x, w):
    z0 = problem.z0(x.detach())
    return problem.joined(fixed_point(problem.f, z0, x, w, coupled=problem.coupled, **RULES[rule]).z)


class Module(nn.Module):
    def __init__(self, problem, w):
        super().__init__()
        self.w, self.problem = nn.Parameter(w), problem

    def forward(self, z, x):
        return self.problem.f(z, x, self.w)


def through_layer(problem, rule, x, w):
    layer = Equilibrium(Module(problem, torch.zeros_like(w)), coupled=problem.coupled, **RULES[rule])
    z0 = {"start": problem.z0(x.detach())}
    return problem.joined(torch.func.functional_call(layer, {"cell.module.w": w}, (x,), z0).z)


def data():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(2, 3), 0.5 * draw(3, 3), draw(2, 3), draw(3, 3)


def energy(z):
    return (z.sin() + 0.5 * z.square()).sum()


def leaves():
    x, w, *_ = data()
    return x.requires_grad_(), w.requires_grad_()


def backward(s):
    x, w = leaves()
    return torch.autograd.grad(energy(s(x, w)), [x, w])


def inputs(s):
    x, w = leaves()
    energy(s(x, w)).backward(inputs=[w])
    return [w.grad]


def double_backward(s):
    x, w = leaves()
    e = energy(s(x, w))
    (force,) = torch.autograd.grad(e, x, create_graph=True)
    return torch.autograd.grad(e + force.square().sum(), [x, w])


def double_backward_to_inputs(s):
    x, w = leaves()
    readout = torch.ones((), dtype=torch.float64, requires_grad=True)
    e = energy(readout * s(x, w))
    (force,) = torch.autograd.grad(e, x, create_graph=True)
    (e + force.square().sum()).backward(inputs=[readout])
    return [readout.grad]


def third_order(s):
    x, w = leaves()
    first = torch.autograd.grad(energy(s(x, w)), [x, w], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, w], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in second), [x, w])


def batched_gradients(s):
    x, w = leaves()
    y = s(x, w)
    seeds = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    return torch.autograd.grad(y, [x, w], seeds, is_grads_batched=True)


def functional_jvp(s):
    x, w, v, _ = data()
    return [torch.autograd.functional.jvp(lambda x: s(x, w), x, v)[1]]


def functional_hessian(s):
    x, w, *_ = data()
    return [torch.autograd.functional.hessian(lambda x: energy(s(x, w)), x, vectorize=True)]


def forward_mode(s):
    x, w, vx, vw = data()
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(s(forward_ad.make_dual(x, vx), forward_ad.make_dual(w, vw)))
        return [out.primal, out.tangent]


def reverse_over_forward(s):
    x, w = leaves()
    *_, vx, vw = data()
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(s(forward_ad.make_dual(x, vx), forward_ad.make_dual(w, vw)))
        return torch.autograd.grad(energy(out.tangent) + out.primal.sum(), [x, w])


def forward_over_reverse(s):
    x, w = leaves()
    *_, vx, vw = data()
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(x, vx), forward_ad.make_dual(w, vw)
        found = torch.autograd.grad(energy(s(*duals)), duals)
        return [part.detach() for gradient in found for part in forward_ad.unpack_dual(gradient)]


def vjp(s):
    x, w, *_ = data()
    return torch.func.vjp(lambda x, w: energy(s(x, w)), x, w)[1](torch.ones((), dtype=torch.float64))


def jvp(s):
    x, w, vx, vw = data()
    return torch.func.jvp(s, (x, w), (vx, vw))


def vmap(s):
    x, w, *_ = data()
    many = torch.stack([x, 2 * x, x - 1])
    return [torch.func.vmap(s, (0, None))(many, w), torch.func.vmap(s)(many, torch.stack([w, w / 2, -w]))]


def gradients_of_each(s):
    x, w, *_ = data()
    many = torch.stack([x, 2 * x, x - 1])
    return torch.func.vmap(torch.func.grad(lambda x, w: energy(s(x, w)), (0, 1)), (0, None))(many, w)


def jacrev(s):
    x, w, *_ = data()
    return torch.func.jacrev(s, (0, 1))(x, w)


def jacfwd(s):
    x, w, *_ = data()
    return torch.func.jacfwd(s, (0, 1))(x, w)


def hessian(s):
    x, w, *_ = data()
    return torch.func.hessian(lambda x: energy(s(x, w)))(x), torch.func.jacrev(torch.func.jacrev(s))(x, w)


TRANSFORMS = (
    backward,
    inputs,
    double_backward,
    double_backward_to_inputs,
    third_order,
    batched_gradients,
    functional_jvp,
    functional_hessian,
    forward_mode,
    reverse_over_forward,
    forward_over_reverse,
    vjp,
    jvp,
    vmap,
    gradients_of_each,
    jacrev,
    jacfwd,
    hessian,
)
FIRST_ORDER = (backward, inputs)
OF_AUTOGRAD = (*FIRST_ORDER, double_backward, double_backward_to_inputs, third_order)
OF_AUTOGRAD = (*OF_AUTOGRAD, batched_gradients, functional_jvp)
RIGHT = {
    "Implicit": TRANSFORMS,
    "Implicit-per-leaf": TRANSFORMS,
    "Neumann": (*FIRST_ORDER, batched_gradients),
    "Shine": (*FIRST_ORDER, batched_gradients),
    "ReversibleGradient": FIRST_ORDER,
    "Phantom": (*OF_AUTOGRAD, functional_hessian),
    "Unroll": tuple(t for t in TRANSFORMS if t not in (vmap, gradients_of_each, jacfwd, hessian)),
}
REFUSED = "cannot be differentiated|inside torch.func.vmap|does not take many cotangents"

CELLS = [
    (rule, transform, problem, call)
    for rule in RULES
    for transform in TRANSFORMS
    for problem in (Tensor(coupled=False), Tensor(coupled=True), Tree(coupled=False), Tree(coupled=True))
    for call in (through, through_layer)
]


def described(cell):
    rule, transform, problem, call = cell
    kind = f"{type(problem).__name__}-{'coupled' if problem.coupled else 'independent'}"
    return f"{rule}-{transform.__name__}-{kind}-{call.__name__}"


@functools.cache
def expected(transform, kind, coupled):
    return [part.detach() for part in transform(functools.partial(unrolled, kind(coupled=coupled)))]


def is_slow(index):
    return index % 10 != 3


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, id=described(c), marks=[pytest.mark.slow] if is_slow(i) else []) for i, c in enumerate(CELLS)],
)
def test_each_cell_is_right_or_refused(cell):
    rule, transform, problem, call = cell
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        if transform not in RIGHT[rule]:
            with pytest.raises(RuntimeError, match=REFUSED):
                transform(functools.partial(call, problem, rule))
            return
        found = transform(functools.partial(call, problem, rule))
    for part, exact in zip(found, expected(transform, type(problem), problem.coupled), strict=True):
        part = part.detach()
        error = (part - exact).norm() / exact.norm()
        if rule == "Shine":
            error = 1 - (part * exact).sum() / part.norm() / exact.norm()
        assert error <= TOLERANCE.get(rule, 1e-9)


@pytest.mark.parametrize("width", [1, 3, 8])  # one number, a system of few numbers, a window
@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), Broyden(), NewtonKrylov(), Reversible()], ids=lambda solver: type(solver).__name__
)
def test_the_tangent_of_every_unrolled_solver_is_the_finite_difference(solver, width):
    generator = torch.Generator().manual_seed(0)
    weight, x, t = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (width, 2, 2))
    weight /= 2 * torch.linalg.matrix_norm(weight, 2)

    def z(x):
        return fixed_point(
            lambda z, x: torch.tanh(0.3 * z @ weight + x),
            torch.zeros_like(x),
            x,
            solver=solver,
            stop=Stop(rtol=1e-8, max_evals=100),
            gradient=Unroll(),
        ).z

    _, tangent = torch.func.jvp(z, (x,), (t,))
    torch.testing.assert_close(tangent, (z(x + 1e-6 * t) - z(x - 1e-6 * t)) / 2e-6, rtol=1e-5, atol=1e-6)
