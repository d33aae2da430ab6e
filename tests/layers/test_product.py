"""``linear`` computes x Wᵀ + b and its derivatives, whichever library multiplies."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional

from equilibria.cells import TransformerConfig
from equilibria.layers import linear as product
from equilibria.layers.cell import CellMap
from equilibria.layers.linear import linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
ROWS, IN, OUT = 37, 19, 23


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """oneDNN multiplies, on every processor and however little there is to do; returns how often it has."""
    count = [0]

    def counted(x, weight, bias=None):
        count[0] += 1
        return one(x, weight, bias)

    one = product.product_by_onednn
    monkeypatch.setattr(product, "product_by_onednn", counted)
    monkeypatch.setattr(product, "MKL_HOLDS_BACK", True)
    monkeypatch.setattr(product, "LEAST_MULTIPLICATIONS", 1)
    return count


def given(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(ROWS, IN, generator=generator), torch.randn(OUT, IN, generator=generator)
    bias, entries = torch.randn(OUT, generator=generator), torch.randn(ROWS, OUT, generator=generator)
    return [t.requires_grad_() for t in (x, weight, bias, entries)]


def exactly(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def close(found, expected, tolerance=1e-6):
    pairs = list(zip(found, expected, strict=True))
    assert all(bool((a.double() - b).norm() <= tolerance * b.norm()) for a, b in pairs)


@pytest.mark.parametrize("added", ["nothing", "bias", "entries"])
@pytest.mark.parametrize("shape", [(ROWS,), (1, ROWS), (ROWS, 1), (1, 1, ROWS)])
def test_value_and_gradients(calls, added, shape):
    x, weight, bias, entries = given()
    more = {"nothing": [], "bias": [bias], "entries": [entries]}[added]
    g = torch.randn(ROWS, OUT)
    shaped = [t.view(*shape, -1) if t is entries else t for t in more]
    value = linear(x.view(*shape, IN), weight, *shaped)
    assert value.shape == (*shape, OUT)
    assert calls == [1]
    found = torch.autograd.grad(value, [x, weight, *more], g.view(value.shape))
    assert calls == [3]
    wide = exactly([x, weight, *more])
    expected = wide[0] @ wide[1].t() + (wide[2] if more else 0)
    close([value.view(ROWS, OUT)], [expected])
    close(found, torch.autograd.grad(expected, wide, g.double()))
    with torch.no_grad():
        assert torch.equal(linear(x.view(*shape, IN), weight, *shaped), value)


def test_only_wanted_gradients_are_computed(calls):
    x, weight, bias, _ = given()
    value = linear(x, weight, bias)
    for wanted, number in ((x, 1), (weight, 1), (bias, 0)):
        calls[0] = 0
        torch.autograd.grad(value, wanted, torch.ones_like(value), retain_graph=True)
        assert calls == [number]
    calls[0] = 0
    value.sum().backward(inputs=[bias])
    assert calls == [0]


def second(x, weight, bias, function):
    value = function(x, weight, bias).tanh()
    first = torch.autograd.grad(value.square().sum(), [x, weight, bias], create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in first), [x, weight, bias])


def test_second_derivatives(calls):
    tensors = given()[:3]
    close(second(*tensors, linear), second(*exactly(tensors), functional.linear), 1e-5)
    assert calls[0] > 0


def test_forward_mode_over_a_recorded_product():
    tensors = given()[:3]

    def tangent(x, weight, bias, function):
        value = function(x, weight, bias).tanh().sum()
        with forward_ad.dual_level():
            scale = forward_ad.make_dual(torch.ones((), dtype=x.dtype), torch.ones((), dtype=x.dtype))
            found = torch.autograd.grad(value, [x, weight, bias], scale)
            return [forward_ad.unpack_dual(t).tangent for t in found]

    close(tangent(*tensors, linear), tangent(*exactly(tensors), functional.linear))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
        lambda f, x, v: torch.func.vjp(f, x)[1](f(v))[0],
        lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
        lambda f, x, v: torch.func.jacrev(f)(x[:2]),
        lambda f, x, v: torch.func.jacfwd(f)(x[:2]),
        lambda f, x, v: torch.autograd.functional.jacobian(f, x[:2], vectorize=True),
    ],
    ids=["jvp", "vjp", "vmap", "jacrev", "jacfwd", "vectorised"],
)
def test_transforms(transform):
    x, weight, bias, _ = (t.detach() for t in given())
    v = torch.randn(ROWS, IN)
    found = transform(lambda x: linear(x, weight, bias).sin(), x, v)
    wide = [t.double() for t in (x, weight, bias)]
    expected = transform(lambda x: functional.linear(x, *wide[1:]).sin(), wide[0], v.double())
    close([found], [expected])


def test_strides_do_not_matter():
    x, weight, bias, _ = (t.detach() for t in given())
    lying = [t.t().contiguous().t() for t in (x, weight)]
    every = torch.stack([x, x], dim=2)[..., 0]
    expected = x.double() @ weight.double().t() + bias
    close([linear(*lying, bias), linear(every, weight, bias)], [expected, expected])
    close([linear(x[:1].expand(5, -1), weight)], [(x[:1].double() @ weight.double().t()).expand(5, -1)])


def test_a_sample_that_is_not_finite_does_not_affect_the_others():
    x, weight, bias, _ = (t.detach() for t in given())
    sound = linear(x, weight, bias)
    x[3], x[5] = torch.nan, torch.inf
    broken = linear(x, weight, bias)
    others = [row for row in range(ROWS) if row not in (3, 5)]
    assert torch.equal(broken[others], sound[others])
    assert not torch.isfinite(broken[[3, 5]]).any()


def test_products_of_other_kinds_are_left_to_pytorch(calls):
    x, weight, bias, _ = given()
    linear(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    torch.backends.mkldnn.enabled = False
    try:
        assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
    finally:
        torch.backends.mkldnn.enabled = True
    assert calls == [0]


def test_the_backward_pass_is_not_under_autocast():
    x, weight, bias, _ = given()
    value = linear(x, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    wide = exactly([x, weight, bias])
    close([found], torch.autograd.grad(functional.linear(*wide).square().sum(), wide[0]))


def test_weights_that_were_changed_raise_an_error():
    x, weight, bias, _ = given()
    value = linear(x, weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value.sum(), x)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_cell_is_the_same_function_with_either_library(calls, monkeypatch, norm):
    torch.manual_seed(0)
    cell = TransformerConfig(width=16, heads=2, inner=32, memory=6, norm=norm, dropout=0.2, std=0.3).build()
    x, z = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    with torch.no_grad():
        memory = cell.remember(x, cell.prepare(x))
    found = []
    for holds_back in (True, False):
        monkeypatch.setattr(product, "MKL_HOLDS_BACK", holds_back)
        torch.manual_seed(1)
        there = CellMap(cell, cell.prepare(x, memory)).linearise(z)
        gradients = torch.autograd.grad(there.value, list(cell.parameters()), x, retain_graph=True)
        found.append([there.value.detach(), there.vjp(x), *gradients])
    assert calls[0] > 10
    close(found[0], [t.double() for t in found[1]], 1e-5)


def test_a_module_that_changes_the_result_in_place():
    x, weight, bias, _ = given()
    value = torch.relu_(linear(x, weight, bias))
    wide = exactly([x, weight, bias])
    close(
        torch.autograd.grad(value.square().sum(), [x, weight]),
        torch.autograd.grad(functional.linear(*wide).relu().square().sum(), wide[:2]),
    )
