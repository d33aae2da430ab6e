"""A reentrant checkpoint tracks tensors and tuples of them: all other results refuse to lose their gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equilibria import (
    Cell,
    Equilibrium,
    Implicit,
    Method,
    Neumann,
    Phantom,
    Picard,
    Prepared,
    Stack,
    Stop,
    Unroll,
    Unrolled,
    fixed_point,
)
from equilibria.cells import TransformerConfig
from equilibria.core.trees import tensors_in
from equilibria.lm.model import LanguageConfig
from equilibria.stability import jacobian_penalty

REFUSED = r"use_reentrant=False"
RULES = {"Implicit": Implicit(), "Neumann": Neumann(3), "Phantom": Phantom(3), "Unroll": Unroll()}


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Pair(Map):
    def forward(self, z: Any, x: Tensor) -> Any:
        a, b = z.values() if isinstance(z, dict) else z
        found = torch.tanh(self.linear(b) + x), torch.tanh(self.linear(a))
        return dict(zip("ab", found, strict=True)) if isinstance(z, dict) else found


def x_of() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def reentrant(region: Any, x: Tensor) -> Any:
    return checkpoint(region, x, use_reentrant=True)


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        **{name: Equilibrium(Map(), gradient=rule) for name, rule in RULES.items()},
        "Unrolled": Unrolled(Map(), depth=4, auxiliary_every=2),
        "Stack": Stack([Map(), Map()]),
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("field", ["z", "output", "solution", "auxiliary"])
def test_a_layer_output_that_leaves_the_checkpoint_refuses_the_backward_pass(name, field):
    value = getattr(reentrant(layers()[name], x_of()), field)
    value = getattr(value, "z", value)
    if not isinstance(value, Tensor):
        if not value:  # only some layers have this field
            return
        value = value[-1]
    with pytest.raises(RuntimeError, match=REFUSED):
        (value * torch.ones(4, requires_grad=True)).sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize(
    "region",
    [
        lambda layer: lambda x: layer(x).z,
        lambda layer: lambda x: layer(x).z.relu(),
        lambda layer: lambda x: layer(x).z[:, :2],
        lambda layer: lambda x: layer(x).z.view(-1),
        lambda layer: lambda x: layer(layer(x).output).output,
        lambda layer: lambda x: reentrant(lambda x: layer(x).z, 2 * x),
    ],
    ids=["z", "relu", "slice", "view", "twice", "nested"],
)
def test_a_layer_output_inside_the_checkpoint_changes_nothing(name, region):
    found = []
    for call in (lambda f, x: f(x), reentrant):
        layer, x = layers()[name], x_of()
        call(region(layer), x).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    # The reentrant kind computes its value without gradients, where Phantom skips its tracked steps.
    allowed = 1e-2 if name == "Phantom" else 0
    torch.testing.assert_close(found[1], found[0], rtol=allowed, atol=allowed)


def test_the_tensor_is_tracked_beside_the_refused_output():
    layer, x = layers()["Implicit"], x_of()
    z, out = reentrant(lambda x: ((out := layer(x)).z, out), x)
    z.sum().backward()
    expected = x_of()
    layer(expected).z.sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=0, atol=0)
    assert out.z is z


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_an_output_of_an_inner_checkpoint_is_refused_inside_the_outer_one():
    layer = layers()["Implicit"]
    value = reentrant(lambda x: reentrant(layer, x).z.relu(), x_of())
    with pytest.raises(RuntimeError, match=REFUSED):
        value.sum().backward()


@pytest.mark.parametrize("kept", ["in_dict", "in_list", "dict_state", "nested_state"])
def test_containers_that_autograd_does_not_track_are_refused(kept):
    torch.manual_seed(0)
    layer, zeros = Equilibrium(Map()), torch.zeros(3, 4)
    pair = Equilibrium(Pair())
    region, read = {
        "in_dict": (lambda x: {"z": layer(x).z}, lambda v: v["z"]),
        "in_list": (lambda x: ((), [layer(x).z])[1:], lambda v: v[0][0]),
        "dict_state": (lambda x: pair(x, start={"a": zeros, "b": zeros}).z, lambda v: v["a"]),
        "nested_state": (lambda x: ((pair(x, start=(zeros, zeros)).z),), lambda v: v[0][0]),
    }[kept]
    with pytest.raises(RuntimeError, match=REFUSED):
        read(reentrant(region, x_of())).sum().backward()


def test_a_tuple_state_is_tracked():
    torch.manual_seed(0)
    layer, zeros, found = Equilibrium(Pair()), torch.zeros(3, 4), []
    for call in (lambda f, x: f(x), reentrant):
        x = x_of()
        a, b = call(lambda x: layer(x, start=(zeros, zeros)).z, x)
        (a + b.square()).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_solutions_are_refused_with_their_iterates():
    f = Map()
    stop = Stop(rtol=0, max_evals=6, best=False)
    found = reentrant(
        lambda x: fixed_point(f, torch.zeros(3, 4), x, solver=Picard(), stop=stop, gradient=Unroll(), keep=(2,)), x_of()
    )
    for value in (found.z, found.iterates[0]):
        with pytest.raises(RuntimeError, match=REFUSED):
            value.sum().backward()


def test_a_language_output_is_refused():
    torch.manual_seed(0)
    cell = TransformerConfig(width=8, heads=2, inner=12, memory=4)
    model = LanguageConfig(cell=cell).build(7, method=Method(on_failure="ignore"))
    tokens, used = torch.randint(0, 7, (2, 6)), torch.ones((), requires_grad=True)

    def region(used: Tensor) -> Any:
        out = model(tokens[:, :-1], tokens[:, 1:])
        return dataclasses.replace(out, nll=out.nll * used)

    out = reentrant(region, used)
    with pytest.raises(RuntimeError, match=REFUSED):
        out.loss.backward()
    with pytest.raises(RuntimeError, match=REFUSED):
        out.layer.output.sum().backward()
    assert not any(tensor.requires_grad for tensor in tensors_in(out.memory))


def test_constants_stay_constants():
    """Where a tensor would have no graph either, as under no_grad, a result without graph is right."""
    layer, weight = layers()["Implicit"], torch.ones(4, requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not reentrant(layer, x_of()).z.requires_grad
    with torch.no_grad():
        z = layer(x_of()).z
    with pytest.warns(UserWarning, match="None of the inputs"):
        frozen = reentrant(layer, x_of().detach())
    (weight * (z + frozen.z)).sum().backward()
    assert weight.grad is not None


def test_the_other_kind_keeps_the_gradients_of_a_layer_output():
    layer, x, y = layers()["Implicit"], x_of(), x_of()
    checkpoint(layer, x, use_reentrant=False).z.sum().backward()
    layer(y).z.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)


def test_other_functions_than_the_checkpoint_are_noticed():
    """Libraries have checkpoints of their own, which are autograd functions as well."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Any, x: Tensor) -> Any:
            return run(x)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            raise AssertionError

    with pytest.raises(RuntimeError, match=REFUSED):
        Own.apply(layers()["Implicit"], x_of()).z.sum().backward()  # pyright: ignore


class Injected(Cell):
    """tanh(W z + U x), whose U x is computed before the solve."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.inject = nn.Linear(4, 4), nn.Linear(4, 4)

    def prepare(self, x: Tensor) -> Prepared:  # pyright: ignore
        return Prepared(rows=self.inject(x))

    def start(self, prepared: Prepared) -> Tensor:
        return torch.zeros_like(prepared.rows)

    def forward(self, z: Tensor, prepared: Prepared) -> Tensor:
        return torch.tanh(self.state(z) + prepared.rows)


def test_a_penalty_through_the_map_of_a_leaked_output_is_refused():
    """The map holds what ``prepare`` has computed, which has lost its graph as well."""
    torch.manual_seed(0)
    layer = Equilibrium(Injected(), on_failure="ignore")
    out = reentrant(layer, x_of())
    loss = jacobian_penalty(out.f, out.z).sum() + layer.cell.inject.weight.square().sum()
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()

    def inside(x: Tensor) -> Tensor:
        out = layer(x)
        return jacobian_penalty(out.f, out.z, generator=torch.Generator().manual_seed(0))

    found = []
    for call in (lambda f, x: f(x), reentrant):
        layer.zero_grad()
        call(inside, x_of()).sum().backward()
        found.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_what_has_leaked_can_be_read_without_gradients():
    out = reentrant(layers()["Implicit"], x_of())
    with torch.no_grad():
        assert jacobian_penalty(out.f, out.z).isfinite().all()
    assert out.solution.converged.all()
    assert out.z.detach().isfinite().all()
