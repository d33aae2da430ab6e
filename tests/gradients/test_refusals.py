"""A rule refuses every derivative that it cannot compute, on every path."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from equilibria import (
    Anderson,
    Broyden,
    ConvergenceWarning,
    Implicit,
    Method,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    ReversibleGradient,
    Shine,
    Stop,
    Unroll,
    fixed_point,
)
from equilibria.core.maps import as_map

TIGHT = Stop(rtol=1e-12, max_evals=61)
EXACT_ONCE = [
    Method(Anderson(), TIGHT, Neumann(40)),
    Method(Broyden(), TIGHT, Shine()),
    Method(Reversible(0.5), TIGHT, ReversibleGradient(), on_failure="ignore"),
]
WITHOUT_FORWARD_MODE = [*EXACT_ONCE, Method(Anderson(), TIGHT, Phantom(3))]


def name(method):
    return type(method.gradient).__name__


def energy(method, x, readout, weight):
    z = method.run(as_map(lambda z: torch.tanh(z @ weight + x)), torch.zeros_like(x)).z
    return (z @ readout).sum()


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(2, 4).requires_grad_(), draw(4).requires_grad_(), (0.3 * draw(4, 4)).requires_grad_()


@pytest.mark.parametrize("method", EXACT_ONCE, ids=name)
def test_a_loss_on_forces_is_refused_whatever_it_is_differentiated_by(method, parts):
    x, readout, weight = parts
    for inputs in ([readout], [weight], [x], None):
        e = energy(method, x, readout, weight)
        (force,) = torch.autograd.grad(e, x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (e + force.square().sum()).backward(inputs=inputs)


@pytest.mark.parametrize("method", EXACT_ONCE, ids=name)
def test_the_functional_jvp_is_refused_and_not_zero(method, parts):
    x, readout, weight = parts
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.functional.jvp(lambda x: energy(method, x, readout, weight), x.detach(), torch.ones_like(x))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(()).double()),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("method", WITHOUT_FORWARD_MODE, ids=name)
def test_transforms_of_torch_func_are_refused(method, transform, grad, parts):
    x, readout, weight = parts
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"transformed by torch\.func"):
        TRANSFORMS[transform](lambda x: energy(method, x, readout, weight), x.detach())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", WITHOUT_FORWARD_MODE, ids=name)
def test_forward_mode_is_refused(method, grad, parts):
    x, readout, weight = parts
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="differentiated in forward mode"):
            energy(method, forward_ad.make_dual(x.detach(), torch.ones_like(x)), readout, weight)
        energy(method, x, readout, weight)  # nothing is dual here


def test_the_many_tangents_of_the_older_vmap_are_refused(parts):
    x, _, weight = (part.detach() for part in parts)
    settings = {"stop": TIGHT, "gradient": Implicit(stop=TIGHT)}

    def of(x):
        return fixed_point(lambda z, x: torch.tanh(z @ weight + x), torch.zeros_like(x), x, **settings).z

    jacobian = torch.autograd.functional.jacobian
    with pytest.raises(RuntimeError, match=r"all tangents at once.*torch.func.jacfwd, or strategy='reverse-mode'"):
        jacobian(of, x, vectorize=True, strategy="forward-mode")
    assert torch.allclose(torch.func.jacfwd(of)(x), jacobian(of, x, vectorize=True, strategy="reverse-mode"))


def test_unrolling_allows_forward_mode(parts):
    x, readout, weight = parts
    method = Method(Picard(), Stop(rtol=0, max_evals=60, best=False), Unroll())

    def f(x):
        return energy(method, x, readout, weight)

    v = torch.ones_like(x)
    value, slope = torch.func.jvp(f, (x.detach(),), (v,))
    (gradient,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(slope, (gradient * v).sum())
    torch.testing.assert_close(value, f(x))
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))
        torch.testing.assert_close(out.tangent, slope)


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("distance", [0.0, 1e-4])
def test_unrolling_from_the_solution_is_warned_of(solver, distance):
    """The exact slope is 0.5·2 = 1; from a start near the solution it is anything between 0 and that."""
    x = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    method = Method(solver, Stop(rtol=1e-3), Unroll())

    def f(z):
        return 0.5 * z + 0.5 * x

    with pytest.warns(ConvergenceWarning, match=r"Unroll\(\): 1 of 1 samples met the tolerance near their start"):
        z = method.run(as_map(f), x.detach() + distance).z
    slope = torch.autograd.grad(z.sum(), x)[0] if z.requires_grad else torch.zeros(())
    assert float((slope - 1).abs()) > 0.01
    fixed = Method(Picard(), Stop(rtol=0, max_evals=40, best=False), Unroll()).run(as_map(f), x.detach() + distance).z
    torch.testing.assert_close(torch.autograd.grad(fixed.sum(), x)[0], torch.ones_like(x))


def test_unrolling_from_the_solution_is_warned_of_in_forward_mode():
    x = torch.ones(1, 1, dtype=torch.float64)
    method = Method(Picard(), Stop(rtol=1e-3), Unroll())
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.warns(ConvergenceWarning, match="met the tolerance near their start"):
            method.run(as_map(lambda z: 0.5 * z + 0.5 * dual), x + 1e-4)


@pytest.mark.parametrize(
    ("dtype", "relaxation", "has", "lacks"),
    [
        (torch.float32, 0.8, "Use a float64 state (f may compute in torch.float32), max_evals=11 at most", "1e+0"),
        (
            torch.float64,
            0.8,
            "Use max_evals=37 at most and less where J is large, or a smaller relaxation",
            "float64 s",
        ),
        (
            torch.bfloat16,
            0.8,
            "Use a float64 state (f may compute in torch.bfloat16), or another rule, such as Implicit().",
            "max_evals=",
        ),
        (torch.float64, 1 - 1e-13, "is allowed). Use a smaller relaxation.", "float64 s"),
    ],
    ids=["float32", "float64", "bfloat16", "hardly invertible"],
)
def test_the_advice_about_steps_that_cannot_be_undone_helps(dtype, relaxation, has, lacks):
    def solved(max_evals, dtype):
        method = Method(Reversible(relaxation), Stop(max_evals=max_evals), ReversibleGradient(), on_failure="ignore")
        return method.run(as_map(lambda z: 0.5 * torch.cos(z)), torch.zeros(2, 3, dtype=dtype))

    with pytest.raises(ValueError, match="rounding would grow to 1e") as raised:
        solved(1999, dtype)
    assert has in str(raised.value)
    assert lacks not in str(raised.value)
    if "max_evals=" in has:
        solved(int(has.partition("max_evals=")[2].split()[0]), dtype)
