"""Modules that write into their buffers: f stays the same during a solve, and each forward pass updates them once."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

from equilibria import (
    Anderson,
    Broyden,
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

TIGHT = Stop(rtol=1e-11, max_evals=300)
METHODS = {
    "Implicit": (Anderson(), Implicit(Anderson(), TIGHT)),
    "Implicit, NewtonKrylov": (NewtonKrylov(), Implicit(Anderson(), TIGHT)),
    "Neumann": (Anderson(), Neumann(80)),
    "Phantom": (Anderson(), Phantom(60)),
    "Unroll": (Picard(), Unroll()),
    "Unroll, checkpointed": (Picard(), Unroll(checkpoint=True)),
    "Shine": (Broyden(), Shine()),
    "Reversible": (Reversible(0.9), ReversibleGradient()),
}


class Normalised(nn.Module):
    """f(z, x) = ½·batch norm(z W + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        nn.init.normal_(self.mixed.weight, std=0.2)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.norm(self.mixed(z) + x)


def numbers() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer_of(module: nn.Module, name: str = "Implicit", *, coupled: bool = True) -> Equilibrium:
    solver, rule = METHODS[name]
    stop = Stop(rtol=1e-9, max_evals=20) if name == "Reversible" else TIGHT
    return Equilibrium(module.double(), solver, stop, rule, coupled=coupled, on_failure="ignore")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recorded", [True, False])
def test_running_statistics_are_updated_once_at_the_equilibrium(name, recorded):
    torch.manual_seed(0)
    layer, x = layer_of(Normalised(), name), numbers()
    norm = layer.cell.module.norm
    with torch.set_grad_enabled(recorded):
        z = layer(x).z.detach()
    inside = (layer.cell.module.mixed(z) + x).detach()
    assert norm.num_batches_tracked == 1
    assert_close(norm.running_mean, 0.1 * inside.mean(dim=0), rtol=1e-6, atol=1e-7)
    assert_close(norm.running_var, 0.9 + 0.1 * inside.var(dim=0), rtol=1e-6, atol=1e-7)
    layer(x)
    assert norm.num_batches_tracked == 2
    layer.eval()
    before = copy.deepcopy(norm.state_dict())
    layer(x)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "Shine"])
def test_gradients_are_those_of_the_function_without_buffers(name):
    torch.manual_seed(0)
    module, x = Normalised(), numbers()
    layer_of(module, name)(x).z[:2].square().sum().backward()

    def f(z: torch.Tensor) -> torch.Tensor:
        norm = module.norm
        inside = module.mixed(z) + x
        return 0.5 * functional.batch_norm(inside, None, None, norm.weight, norm.bias, training=True)

    parameters = list(module.parameters())
    z = fixed_point(f, torch.zeros_like(x), stop=TIGHT, gradient=Implicit(stop=TIGHT), coupled=True).z
    expected = torch.autograd.grad(z[:2].square().sum(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        # Reversible can undo ten steps here.
        assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-5 if name == "Reversible" else 1e-8)


def test_a_second_derivative_reads_the_buffers_of_its_forward_pass_and_writes_none():
    torch.manual_seed(0)
    module = Normalised()
    layer, x = layer_of(module), numbers().requires_grad_()

    def penalty(others: int) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(layer(x).z[:2].square().sum(), x, create_graph=True)
        for _ in range(others):
            layer(2 * numbers())
        before = copy.deepcopy(module.norm.state_dict())
        second = torch.autograd.grad(gradient.square().sum(), module.mixed.weight)[0]
        assert all(torch.equal(value, before[key]) for key, value in module.norm.state_dict().items())
        return second

    assert_close(penalty(others=2), penalty(others=0), rtol=1e-8, atol=1e-10)


def test_spectral_norm_is_the_same_at_every_evaluation():
    """Its power iteration used to take one step per evaluation, so that f changed during the solve."""
    torch.manual_seed(0)
    mixed = spectral_norm(nn.Linear(4, 4, bias=False).double())
    mixed.parametrizations.weight[0]._u.copy_(functional.normalize(torch.ones(4).double(), dim=0))

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = mixed

        def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(0.8 * self.mixed(z) + x)

    layer, x = layer_of(Cell(), coupled=False), numbers()
    once = copy.deepcopy(mixed)
    once(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = Equilibrium(layer.cell, stop=TIGHT, gradient=Implicit(stop=TIGHT), on_failure="raise")(x)
        out.z.sum().backward()
    assert_close(mixed.parametrizations.weight[0]._u, once.parametrizations.weight[0]._u, rtol=0, atol=0)
    assert torch.equal(out.f(out.z), out.f(out.z))


def test_a_lazy_buffer_is_refused_until_it_has_a_shape():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LazyBatchNorm1d()

        def forward(self, z, x):
            return torch.tanh(self.norm(0.3 * z + x))

    module, x = Lazy(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    layer = Equilibrium(module, coupled=True)
    with pytest.raises(ValueError, match=r"The buffer module\.norm\.running_mean inside f has no shape yet"):
        layer(x)
    module(torch.zeros_like(x), x)
    assert layer(x).solution.converged.all()
