from __future__ import annotations

import math

import pytest
import torch

from equilibria import Broyden, Equilibrium, Implicit, Stop
from equilibria.cells import AffineConfig


def test_known_equilibrium():
    cell = AffineConfig(width=6, norm=0.7).build().double()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    z = cell.equilibrium(x)
    torch.testing.assert_close(cell(z, cell.prepare(x)), z)
    assert math.isclose(float(torch.linalg.matrix_norm(cell.a.detach(), ord=2)), 0.7, rel_tol=1e-6)


def test_gradient_of_the_layer_is_that_of_the_linear_solve():
    stop = Stop(rtol=1e-12, atol=1e-12, max_evals=100)
    layer = Equilibrium(AffineConfig(width=6).build().double(), Broyden(), stop, Implicit(solver=Broyden(), stop=stop))
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    g = torch.randn_like(x)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad((layer.cell.equilibrium(x) * g).sum(), parameters)
    actual = torch.autograd.grad((layer(x).z * g).sum(), parameters)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("choice", [{"width": 0}, {"norm": -1.0}, {"norm": math.inf}])
def test_refuses(choice):
    with pytest.raises(ValueError, match=next(iter(choice))):
        AffineConfig(**choice)
