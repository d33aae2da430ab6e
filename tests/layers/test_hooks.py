"""Hooks of modules inside f act in every evaluation, whoever asks for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune

from equilibria import Cell, Equilibrium, Implicit, Prepared, Reversible, ReversibleGradient, Stop

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
TIGHT = Stop(1e-12, max_evals=200)


class Weighted(Cell):
    """f(z; x) = tanh(W z + x), with W as a parameter of the cell itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4).double() / 10)

    def forward(self, z, prepared):
        return torch.tanh(z @ self.weight.T + prepared.shared[0])


def halved(cell):
    cell.register_forward_hook(lambda module, args, value: value / 2)
    return cell


CELLS = {
    "forward hook": halved,
    "prune": lambda cell: prune.random_unstructured(cell, "weight", 0.3),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrisation": parametrizations.weight_norm,
}


@pytest.fixture(params=CELLS)
def cell(request):
    cell, zeros = CELLS[request.param](Weighted()), torch.zeros(1, 4).double()
    for _ in range(30):  # for the vectors of spectral norm
        cell(zeros, Prepared(shared=(zeros,)))
    return cell.eval()


def unrolled(cell, x):
    z = torch.zeros_like(x)
    for _ in range(60):
        z = cell(z, Prepared(shared=(x,)))
    return z


def layer_of(cell):
    return Equilibrium(cell, stop=TIGHT, gradient=Implicit(stop=TIGHT))


def close(found, expected):
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


def test_second_derivatives(cell):
    x = torch.randn(3, 4).double().requires_grad_()

    def twice(z):
        (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *cell.parameters()])

    close(twice(layer_of(cell)(x).z), twice(unrolled(cell, x)))


def test_transforms(cell):
    layer, x = layer_of(cell), torch.randn(3, 4).double()

    def loss(weights):
        return torch.func.functional_call(layer, weights, (x,)).z.square().sum()

    found = torch.func.grad(loss)(dict(layer.named_parameters()))
    close(found.values(), torch.autograd.grad(unrolled(cell, x).square().sum(), list(cell.parameters())))


def test_forward_mode(cell):
    x, v = torch.randn(2, 3, 4).double()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer_of(cell)(forward_ad.make_dual(x, v)).z).tangent
    _, expected = torch.autograd.functional.jvp(lambda x: unrolled(cell, x), x, v)
    close([tangent], [expected])


def test_the_reversible_gradient(cell):
    x = torch.randn(3, 4).double().requires_grad_()
    stop = Stop(0, max_evals=61, best=False)
    z = Equilibrium(cell, Reversible(0.5), stop, ReversibleGradient())(x).z
    wanted = [x, *cell.parameters()]
    found = torch.autograd.grad(z.square().sum(), wanted)
    for mine, other in zip(found, torch.autograd.grad(unrolled(cell, x).square().sum(), wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
