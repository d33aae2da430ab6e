"""Products J·v in every way, for maps that do not allow forward mode; the estimates that are made of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from equilibria import Anderson, Evaluator, Implicit, Layout, NewtonKrylov, Picard, Stop, Unroll, fixed_point, solve
from equilibria.core.maps import as_map
from equilibria.stability import check_independence, error_estimate
from equilibria.testing.problems import tanh_map


class Tanh(torch.autograd.Function):
    """A function without a rule for forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def attention(z):
    heads = z.view(len(z), 2, 4, 4)
    return 0.4 * functional.scaled_dot_product_attention(heads, heads, heads).flatten(1) + 0.1


def nested(z):
    """Each evaluation is a solve itself."""
    inner = fixed_point(
        lambda y: 0.3 * y + 0.5 * torch.sin(z), torch.zeros_like(z), stop=Stop(rtol=1e-12, max_evals=50)
    )
    return 0.5 * inner.z + 0.1


MAPS = {"custom function": lambda z: Tanh.apply(0.5 * z) + 0.1, "fused attention": attention, "nested": nested}


@pytest.mark.parametrize("how", ["auto", "double", "differences"])
@pytest.mark.parametrize("name", MAPS)
def test_newton_krylov_solves_maps_without_forward_mode(name, how):
    if how == "double" and name != "custom function":
        pytest.skip("it has no second derivative")
    f, z0 = MAPS[name], torch.zeros(3, 32, dtype=torch.float64)
    with torch.no_grad():
        found = solve(f, z0, NewtonKrylov(jvp=how), Stop(rtol=1e-9, max_evals=100))
        plain = solve(f, z0, Picard(), Stop(rtol=1e-12, max_evals=300))
    assert found.converged.all()
    torch.testing.assert_close(found.z, plain.z, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("how", ["forward", "differences"])
def test_every_evaluation_is_counted(how):
    """Differences need f(z), which the solve has evaluated already; they evaluated it again, uncounted."""
    _, x, f = tanh_map()
    calls = []

    def counted(z):
        calls.append(1)
        return f(z)

    stop = Stop(rtol=1e-14, max_evals=30)
    with torch.no_grad():
        found = solve(counted, torch.zeros_like(x), NewtonKrylov(inner=3, jvp=how), stop)
    assert found.evals == len(calls) <= 30
    evaluate = Evaluator(as_map(counted), Layout.of(x), max_evals=9)
    calls.clear()
    with torch.no_grad():
        for _ in range(2):
            evaluate.jvp(x, x, how=how)
    assert evaluate.evals == len(calls)


@pytest.mark.parametrize("how", ["forward", "double"])
def test_the_ways_agree_and_are_differentiated(how):
    weight, x, f = tanh_map()
    stop = Stop(rtol=1e-13, max_evals=200)
    z = fixed_point(f, torch.zeros_like(x), solver=NewtonKrylov(jvp=how), stop=stop, gradient=Unroll()).z
    (found,) = torch.autograd.grad(z.square().sum(), weight)
    z = fixed_point(f, torch.zeros_like(x), stop=stop, gradient=Implicit(Anderson(), stop)).z
    torch.testing.assert_close(found, torch.autograd.grad(z.square().sum(), weight)[0], rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("unhooked")
def test_a_way_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="one of 'auto', 'forward', 'double', 'differences'"):
        NewtonKrylov(jvp="reverse")  # pyright: ignore


@pytest.mark.parametrize("radius", [0.5, 0.999])
def test_the_error_estimate_sees_what_the_residual_hides(radius):
    x = torch.randn(4, 6, dtype=torch.float64)
    exact = x / (1 - radius)

    def f(z):
        return radius * z + x

    with torch.no_grad():
        found = solve(f, torch.zeros_like(x), Picard(), Stop(rtol=1e-3, max_evals=2000))
    assert found.converged.all()
    error = (found.z - exact).norm(dim=1) / found.z.norm(dim=1)
    torch.testing.assert_close(error_estimate(f, found.z), error, rtol=1e-6, atol=0)
    if radius > 0.9:
        assert (error > 0.3).all()


def test_independence_is_checked():
    _, x, f = tanh_map(batch=5)
    assert check_independence(f, torch.zeros_like(x)).independent
    z = torch.randn(5, 4)
    for mixing in (
        lambda z: z + 1e-3 * z.roll(1, dims=0),
        lambda z: functional.batch_norm(z, None, None, training=True),
    ):
        found = check_independence(mixing, z)
        assert not found.independent
        assert (found.leak > 1e-4).all()
    assert check_independence(lambda z: torch.tanh(z), torch.ones(1, 3)).independent


def test_what_is_not_finite_is_neither_exact_nor_independent():
    z = torch.ones(3, 4, dtype=torch.float64)
    poisoned = torch.tensor([[1.0], [torch.nan], [1.0]], dtype=torch.float64)
    found = error_estimate(lambda z: 0.5 * z * poisoned, z)
    assert found[1].isnan()
    torch.testing.assert_close(found[[0, 2]], torch.ones(2, dtype=torch.float64))
    assert error_estimate(lambda z: 0.5 * z + 1, torch.zeros_like(z)).isinf().all()
    assert not check_independence(lambda z: z * torch.nan, z).independent
