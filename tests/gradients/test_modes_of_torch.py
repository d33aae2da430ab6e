"""Modes of PyTorch around a solve, or around what comes before and after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from equilibria import (
    Equilibrium,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    ReversibleGradient,
    Stop,
    Unroll,
    fixed_point,
)

TIGHT = Stop(1e-12, max_evals=200)
METHODS = {
    "Implicit": {"stop": TIGHT, "gradient": Implicit(stop=TIGHT)},
    "Neumann": {"stop": TIGHT, "gradient": Neumann(80)},
    "Phantom": {"stop": TIGHT, "gradient": Phantom(80)},
    "Unroll": {"solver": Picard(), "stop": Stop(0, max_evals=80, best=False), "gradient": Unroll()},
    "checkpoint": {"solver": Picard(), "stop": Stop(0, max_evals=80, best=False), "gradient": Unroll(checkpoint=True)},
    "Reversible": {"solver": Reversible(0.5), "stop": Stop(0, max_evals=61), "gradient": ReversibleGradient()},
}


class Map(nn.Module):
    """tanh(W z + x)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4).double() / 10)

    def forward(self, z, x):
        return torch.tanh(z @ self.weight.T + x)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:.*Unroll:UserWarning")
def test_a_start_that_was_made_in_inference_mode(name):
    layer, x = Equilibrium(Map(), on_failure="ignore", **METHODS[name]), torch.randn(3, 4).double().requires_grad_()
    with torch.inference_mode():
        start = layer(x).z
    expected = torch.autograd.grad(layer(x, start=start.clone()).z.square().sum(), [x, *layer.parameters()])
    found = torch.autograd.grad(layer(x, start=start).z.square().sum(), [x, *layer.parameters()])
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    assert start.is_inference()


@pytest.mark.parametrize("record", [lambda f, x: torch.func.linearize(f, x)[1](x), lambda f, x: make_fx(f)(x)])
def test_what_records_a_graph_without_values_is_refused_in_a_sentence(record):
    with pytest.raises(RuntimeError, match=r"cannot be recorded by torch\.func\.linearize .* use torch\.func\.jvp"):
        record(lambda x: fixed_point(lambda z, x: torch.tanh(z / 2 + x), torch.zeros_like(x), x).z, torch.randn(3, 4))


class Read(nn.Module):
    """Twice the state of a layer."""

    def __init__(self):
        super().__init__()
        self.layer = Equilibrium(Map())

    def forward(self, x):
        return 2 * self.layer(x).z


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Equilibrium) or super().is_leaf_module(m, module_qualified_name)


def test_a_symbolic_trace_keeps_a_layer_whole_or_is_refused_in_a_sentence():
    model, x = Read(), torch.randn(3, 4).double()
    with pytest.raises(RuntimeError, match=r"torch\.fx traces without numbers.*is_leaf_module.*Unrolled"):
        torch.fx.symbolic_trace(model)
    traced = torch.fx.GraphModule(model, Leaves().trace(model))
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("before", [True, False])
def test_a_weight_frozen_or_unfrozen_between_two_passes_is_named_in_the_second_derivative(before):
    cell, x = Map(), torch.randn(3, 4).double().requires_grad_()
    cell.weight.requires_grad_(before)
    z = Equilibrium(cell)(x).z
    cell.weight.requires_grad_(not before)
    with pytest.raises(RuntimeError, match="no weight may be frozen, unfrozen or replaced"):
        torch.autograd.grad(z.square().sum(), x, create_graph=True)


def test_a_weight_unfrozen_before_the_reversible_backward_pass_is_named():
    cell, x = Map(), torch.randn(3, 4).double().requires_grad_()
    cell.weight.requires_grad_(False)
    z = Equilibrium(cell, **METHODS["Reversible"])(x).z
    cell.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="unfrozen after the forward pass"):
        z.sum().backward()
