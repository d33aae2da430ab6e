"""Implicit at higher orders: every solver, real cells, memory, and every kind of f."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from equilibria import Anderson, Broyden, Equilibrium, Implicit, NewtonKrylov, Picard, Stop, fixed_point
from equilibria.cells import TransformerCell, TransformerConfig
from slow_cases import some_slow

TIGHT = Stop(rtol=1e-13, max_evals=200)
EXACT = {"solver": Anderson(), "stop": TIGHT, "gradient": Implicit(Anderson(), TIGHT)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def parts():
    return draw(2, 3).requires_grad_(), (0.3 * draw(3, 3, seed=1)).requires_grad_()


def tanh(z, x, w):
    return torch.tanh(z @ w + x)


@pytest.mark.parametrize(
    ("solver", "batch"),
    [(Anderson(), 2), *some_slow((Broyden(), 1), (Picard(), 1), (NewtonKrylov(), 1))],
    ids=lambda s: type(s).__name__,
)
def test_gradgradcheck(solver, batch):
    parts = draw(batch, 2).requires_grad_(), (0.2 * draw(2, 2, seed=1)).requires_grad_()  # each number costs solves

    def solved(x, w):
        return fixed_point(lambda z: tanh(z, x, w), torch.zeros_like(x), solver=solver, stop=TIGHT, gradient=rule).z

    rule = Implicit(solver, TIGHT)
    assert gradcheck(solved, parts, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solved, parts, check_fwd_over_rev=True)


def test_a_loss_on_forces_equals_a_long_unroll(parts):
    readout = draw(3, seed=2).requires_grad_()

    def forces(z_of):
        x, w = (part * 1.0 for part in parts)
        energy = (z_of(x, w) @ readout).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return torch.autograd.grad(energy + force.square().sum(), [*parts, readout])

    def unrolled(x, w):
        z = torch.zeros_like(x)
        for _ in range(300):
            z = tanh(z, x, w)
        return z

    found = forces(lambda x, w: fixed_point(lambda z: tanh(z, x, w), torch.zeros_like(x), **EXACT).z)
    for a, b in zip(found, forces(unrolled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def saved_bytes(steps):
    """The bytes that autograd keeps for a second backward pass after solves of this many steps."""
    x, w = draw(2, 3).requires_grad_(), (0.3 * draw(3, 3, seed=1)).requires_grad_()
    stop = Stop(rtol=0, max_evals=steps, best=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        z = fixed_point(
            tanh, torch.zeros_like(x), x, w, solver=Picard(), stop=stop, gradient=Implicit(Picard(), stop)
        ).z
        (force,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    force.square().sum().backward()
    return sum(kept)


def test_memory_of_the_second_backward_does_not_grow_with_the_steps():
    assert saved_bytes(80) == saved_bytes(20)


def test_nothing_is_kept_in_a_circle(parts):
    x, w = parts

    def second(through_all):
        z = fixed_point(tanh, torch.zeros_like(x), x, w, **EXACT).z
        (force,) = torch.autograd.grad(
            z.sum(), x, create_graph=True
        )  # some hooks are never reached: w is not asked for
        if through_all:
            torch.autograd.grad(force.square().sum(), [x, w])

    def living():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for through_all in (False, True):
        second(through_all)
        before = living()
        for _ in range(5):
            second(through_all)
        assert living() == before


def second_derivatives(z, tensors):
    first = torch.autograd.grad(z.sin().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)


def test_what_f_reads_is_released_before_the_adjoint_solve(parts):
    """A backward pass that releases the graph needs no other evaluation of f; one that keeps the graph may."""
    x, w = parts

    class Reads:
        """An object that only another evaluation of f would need."""

    alive, seen = Reads(), []
    watched = weakref.ref(alive)

    def solved(alive):
        return fixed_point(lambda z: (alive, tanh(z, x, w))[1], torch.zeros_like(x), **EXACT).z

    z = solved(alive)
    del alive
    # The gradient of w is computed after the solve, in the same pass.
    handle = w.register_hook(lambda _: seen.append(watched() is None))
    z.square().sum().backward(retain_graph=True)
    (gradient,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    gradient.sum().backward(retain_graph=True)
    assert not any(seen)
    seen.clear()
    z.sum().backward()
    assert seen == [True]
    handle.remove()
    with pytest.raises(RuntimeError, match=r"retain_graph|second time"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_second_derivatives_of_a_transformer_cell():
    """Compared with differences of the first derivative, since plain iteration of this cell diverges."""
    torch.manual_seed(0)
    cell = TransformerCell(TransformerConfig(width=8, heads=2, inner=16)).double()
    stop = Stop(rtol=1e-11, max_evals=300)
    layer = Equilibrium(cell, Broyden(rank=300), stop, Implicit(Broyden(rank=300), stop))
    tensors = [draw(2, 4, 8).requires_grad_(), *cell.parameters()]
    along = [draw(*tensor.shape, seed=i) for i, tensor in enumerate(tensors)]

    def gradient(*, create_graph=False):
        return torch.autograd.grad(layer(tensors[0]).z.sin().sum(), tensors, create_graph=create_graph)

    slope = sum((g * v).sum() for g, v in zip(gradient(create_graph=True), along, strict=True))
    found = torch.autograd.grad(slope, tensors)
    step, sides = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for tensor, v in zip(tensors, along, strict=True):
                tensor.add_(v, alpha=sign * step)
        sides.append(gradient())
    for a, high, low in zip(found, *sides, strict=True):
        b = (high - low) / (2 * step)
        assert float((a - b).norm()) < 1e-5 * max(1.0, float(b.norm()))


def test_a_fixed_point_inside_a_fixed_point(parts):
    x, w = parts

    def inner(z, x, w):
        return fixed_point(lambda y: 0.3 * torch.sin(y @ w + z), torch.zeros_like(z), **EXACT).z

    def outer(z):
        return torch.tanh(0.5 * inner(z, x, w) + x)

    z = fixed_point(outer, torch.zeros_like(x), **EXACT).z
    y = torch.zeros_like(x)
    for _ in range(60):
        i = torch.zeros_like(x)
        for _ in range(40):
            i = 0.3 * torch.sin(i @ w + y)
        y = torch.tanh(0.5 * i + x)
    for a, b in zip(second_derivatives(z, [x, w]), second_derivatives(y, [x, w]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_what_f_reads_may_depend_on_what_it_reads(parts):
    """w enters f itself and through a tensor made of it: each way counts once, at every order."""
    x, w = parts

    def f_of(shift):
        return lambda z: torch.tanh(z @ w + shift)

    z = fixed_point(f_of((w @ w).sum(0) + x), torch.zeros_like(x), **EXACT).z
    y, f = torch.zeros_like(x), f_of((w @ w).sum(0) + x)
    for _ in range(200):
        y = f(y)
    for a, b in zip(second_derivatives(z, [x, w]), second_derivatives(y, [x, w]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("copied", [True, False])
def test_f_may_return_what_it_reads(copied):
    x = draw(2, 3).requires_grad_()
    z = fixed_point(lambda z: x.clone() if copied else x, torch.zeros_like(x), **EXACT).z
    (first,) = torch.autograd.grad(z.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], 6 * x)


def test_a_closure_over_a_module_whose_weights_were_taken_away_is_an_error(parts):
    """After ``functional_call`` f would be evaluated with other weights than in the solve."""
    x, w = parts
    linear = torch.nn.Linear(3, 3).double()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return fixed_point(lambda z: torch.tanh(self.linear(z) + x), torch.zeros_like(x), **EXACT).z

    z = torch.func.functional_call(Layer(), {"linear.weight": w}, (x,))
    with pytest.raises(RuntimeError, match="read other tensors than before"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_a_closure_inside_a_transform_is_refused_with_what_to_do(parts):
    x, w = (part.detach() for part in parts)

    def loss(x):
        return fixed_point(lambda z: torch.tanh(z @ w + x), torch.zeros_like(x), **EXACT).z.sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(RuntimeError, match="pass it as an operand"):
            transform(loss)(x)
    with pytest.raises(RuntimeError, match="pass it as an operand"):
        torch.func.vmap(loss)(torch.stack([x, x]))


def test_operands_may_be_complex():
    """Their gradients and tangents inside torch.func were 0, without a word."""
    w, x, along = 0.2 * torch.view_as_complex(draw(3, 3, 2)), draw(2, 3, 2), torch.view_as_complex(draw(3, 3, 2))

    def f(z, w, x):
        return torch.view_as_real(torch.tanh(torch.view_as_complex(z) @ w + torch.view_as_complex(x)))

    def loss(w):
        return fixed_point(f, torch.zeros_like(x), w, x, **EXACT).z.pow(3).sum()

    def unrolled(w):
        z = torch.zeros_like(x)
        for _ in range(100):
            z = f(z, w, x)
        return z.pow(3).sum()

    tracked = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(unrolled(tracked), tracked)
    torch.testing.assert_close(torch.func.grad(loss)(w), expected, rtol=1e-8, atol=1e-10)
    tangent = torch.func.jvp(loss, (w,), (along,))[1]
    torch.testing.assert_close(tangent, (expected.conj() * along).real.sum(), rtol=1e-8, atol=1e-10)


def test_transforms_keep_the_point(parts):
    x, w = (part.detach() for part in parts)

    def points(x):
        found = fixed_point(tanh, torch.zeros_like(x), x, w, keep=(2, 3), keep_point=True)
        return found.z, (found.point, *found.iterates)

    plain = points(x)[1]
    for transformed, given in (
        (torch.func.vjp(points, x, has_aux=True)[2], plain),
        (torch.func.vmap(points)(torch.stack([x, x]))[1], [torch.stack([each, each]) for each in plain]),
    ):
        for mine, theirs in zip(transformed, given, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_nested_forward_modes_are_refused(parts):
    x, w = (part.detach() for part in parts)
    with pytest.raises(RuntimeError, match="Two nested forward modes"):
        torch.func.jacfwd(torch.func.jacfwd(lambda x: fixed_point(tanh, torch.zeros_like(x), x, w, **EXACT).z))(x)


def test_many_cotangents_with_a_graph_are_refused(parts):
    x, w = parts
    z = fixed_point(tanh, torch.zeros_like(x), x, w, **EXACT).z
    seeds = torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    with pytest.raises(RuntimeError, match="cannot be combined"):
        torch.autograd.grad(z, x, seeds, is_grads_batched=True, create_graph=True)


@pytest.mark.parametrize("batched", [False, True])
def test_failure_is_heard_inside_transforms(parts, batched):
    x, w = (part.detach() for part in parts)
    short = {"solver": Picard(), "stop": Stop(rtol=1e-9, max_evals=3), "gradient": Implicit(Picard(), TIGHT)}

    def loss(x):
        return fixed_point(tanh, torch.zeros_like(x), x, w, **short).z.sum()

    transform = torch.func.vmap(torch.func.grad(loss)) if batched else torch.func.grad(loss)
    with pytest.warns(UserWarning, match="The forward solve: 0 of"):
        transform(x[None] if batched else x)
