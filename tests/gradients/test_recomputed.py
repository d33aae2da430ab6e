"""``torch.utils.checkpoint`` and other hooks on saved tensors: the same gradients, at most twice the evaluations."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from equilibria import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    Method,
    Neumann,
    NewtonKrylov,
    PeakMemory,
    Phantom,
    Picard,
    Reversible,
    ReversibleGradient,
    Shine,
    Stop,
    Unroll,
    fixed_point,
)
from equilibria.cells import TransformerConfig
from equilibria.lm.model import LanguageConfig
from equilibria.stability import check_independence, jacobian_penalty, spectral_radius

TIGHT = Stop(rtol=1e-6, max_evals=60)
RULES = {
    "Implicit": (Anderson(), Implicit(Anderson(), TIGHT)),
    "Neumann": (Anderson(), Neumann(5)),
    "Phantom": (Anderson(), Phantom(3)),
    "Shine": (Broyden(), Shine()),
    "Unroll": (Picard(), Unroll()),
    "Unroll, checkpointed": (Picard(), Unroll(checkpoint=True)),
    "ReversibleGradient": (Reversible(0.5), ReversibleGradient()),
    "NewtonKrylov": (NewtonKrylov(jvp="double"), Implicit(Anderson(), TIGHT)),
}


class Counted(nn.Module):
    """tanh(W z + U x), which counts its evaluations."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.evals, self.recurrent, self.inject = 0, nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.recurrent.weight.mul_(0.6)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evals += 1
        return torch.tanh(self.recurrent(z) + self.inject(x))


def layer_of(rule: str = "Implicit") -> Equilibrium:
    torch.manual_seed(0)
    solver, gradient = RULES[rule]
    return Equilibrium(Counted(), solver, TIGHT, gradient).double()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(region: Any, x: Tensor, parameters: Any, *, how: bool | None) -> tuple[Tensor, Tensor]:
    """The value of a region of code, and all gradients in one vector; ``how`` is ``use_reentrant``, None for none."""
    torch.manual_seed(2)
    tensors = [x, *parameters]
    for tensor in tensors:
        tensor.grad = None
    value = region(x) if how is None else checkpoint(region, x, use_reentrant=how)
    value.square().sum().backward()
    return value.detach(), torch.cat([tensor.grad.flatten() for tensor in tensors if tensor.grad is not None])


def counts_and_gradients(layer: Equilibrium, *, how: bool | None, region: Any = None) -> tuple[int, Tensor, Tensor]:
    module: Any = layer.cell.module  # pyright: ignore
    module.evals = 0
    value, found = gradients(region or (lambda x: layer(2 * x).output), inputs(4, 5), layer.parameters(), how=how)
    return module.evals, value, found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_layer_evaluates_f_at_most_twice_as_often(rule, reentrant):
    layer = layer_of(rule)
    evals, value, expected = counts_and_gradients(layer, how=None)
    again, found_value, found = counts_and_gradients(layer, how=reentrant)
    assert again <= 2 * evals
    # The reentrant kind computes its value without gradients, where Phantom skips its tracked steps.
    allowed = 1e-5 if reentrant and rule == "Phantom" else 0
    torch.testing.assert_close(found_value, value, rtol=allowed, atol=allowed)
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed)


def test_each_backward_pass_recomputes_once():
    layer = layer_of()
    evals, *_ = counts_and_gradients(layer, how=None)
    layer.cell.module.evals = 0
    value = checkpoint(lambda x: layer(2 * x).output, inputs(4, 5), use_reentrant=False)
    loss, found = value.square().sum(), []
    for _ in range(3):
        layer.zero_grad()
        loss.backward(retain_graph=True)
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    assert layer.cell.module.evals == 4 * evals
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_gradients_of_chosen_tensors():
    layer, x = layer_of(), inputs(4, 5)
    chosen = [layer.cell.module.inject.weight, x]
    expected = torch.autograd.grad(layer(x).output.square().sum(), chosen)
    layer.cell.module.evals = 0
    found = torch.autograd.grad(checkpoint(lambda x: layer(x).output, x, use_reentrant=False).square().sum(), chosen)
    evals = layer.cell.module.evals
    layer(x)
    assert evals <= 2 * (layer.cell.module.evals - evals)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_derivatives_recompute_once_per_backward_pass():
    layer, x = layer_of(), inputs(4, 5)
    tensors, counts, second = [x, *layer.parameters()], [], []
    for checkpointed in (False, True):
        layer.cell.module.evals = 0
        value = checkpoint(lambda x: layer(x).output, x, use_reentrant=False) if checkpointed else layer(x).output
        first = torch.autograd.grad(value.square().sum(), tensors, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
        counts.append(layer.cell.module.evals)
    assert counts[1] <= 3 * counts[0]  # two passes
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_reentrant_kind_refuses_second_derivatives():
    layer, x = layer_of(), inputs(4, 5)
    value = checkpoint(lambda x: layer(x).output, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"incompatible with \.grad"):
        torch.autograd.grad(value.square().sum(), x, create_graph=True)


def test_a_checkpoint_within_a_checkpoint():
    layer = layer_of()

    def region(x):
        h = checkpoint(lambda x: layer(x).output, 2 * x, use_reentrant=False)
        return layer(h).output

    _, value, expected = counts_and_gradients(layer, how=None, region=lambda x: layer(layer(2 * x).output).output)
    _, again, found = counts_and_gradients(layer, how=False, region=region)
    assert torch.equal(value, again)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_fixed_point_within_a_fixed_point():
    evals, weight = [0], (0.2 * inputs(5, 5)).detach().requires_grad_()

    def outer(z, x):
        def inner(y):
            evals[0] += 1
            return torch.tanh(y @ weight + z)

        return 0.3 * fixed_point(inner, torch.zeros_like(z), stop=TIGHT).z + x

    def region(x):
        return fixed_point(outer, torch.zeros_like(x), x, stop=TIGHT, gradient=Implicit(stop=TIGHT)).z

    counts, found = [], []
    for how in (None, False):
        evals[0] = 0
        found.append(gradients(region, inputs(4, 5), [weight], how=how)[1])
        counts.append(evals[0])
    assert counts[1] <= 2 * counts[0]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_checkpoint_inside_f_evaluates_it_once_more_per_vjp():
    layer = layer_of()
    evals, value, expected = counts_and_gradients(layer, how=None)
    inside, module = layer_of(), layer.cell.module

    def region(x):
        def f(z, x):
            return checkpoint(module, z, x, use_reentrant=False)

        method = inside.method
        out = fixed_point(f, torch.zeros_like(x), x, solver=method.solver, stop=TIGHT, gradient=method.gradient)
        adjoint.append(out.adjoint)
        return out.z

    adjoint: list[Any] = []
    again, found_value, found = counts_and_gradients(layer, how=None, region=lambda x: region(2 * x))
    assert again == evals + adjoint[0][0].evals + 1
    assert torch.equal(value, found_value)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_reentrant_checkpoint_inside_f_is_refused():
    module, x = Counted().double(), inputs(4, 5)
    z = fixed_point(lambda z: checkpoint(module, z, x, use_reentrant=True), torch.zeros_like(x)).z
    with pytest.raises(RuntimeError, match=r"incompatible with \.grad"):
        z.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", ["exact", "fused"])
@pytest.mark.parametrize("half", [False, True])
def test_language_models_draw_the_same_masks_again(reentrant, attention, half):
    torch.manual_seed(0)
    dropout = {"dropout": 0.3} | ({"attention_dropout": 0.2} if attention == "exact" else {})
    cell = TransformerConfig(width=8, heads=2, inner=12, memory=3, attention=attention, **dropout)
    stop = Stop(rtol=2e-2 if half else 1e-4, max_evals=60)
    model = LanguageConfig(cell=cell, dropout=0.3).build(11, method=Method(stop=stop, gradient=Implicit(stop=stop)))
    with torch.no_grad():
        model.layer.cell.inject.direction.mul_(10_000)  # a contraction
    tokens, used = torch.randint(0, 11, (3, 7)), torch.ones((), requires_grad=True)
    memory = model(tokens[:, :-1], tokens[:, 1:]).memory
    evals = [0]
    model.layer.cell.register_forward_pre_hook(lambda *_: evals.__setitem__(0, evals[0] + 1))

    def region(used):
        return model(tokens[:, :-1], tokens[:, 1:], memory).nll * used

    counts, results = [], []
    for how in (None, reentrant):
        evals[0] = 0
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            results.append(gradients(region, used, model.parameters(), how=how))
        counts.append(evals[0])
    assert counts[1] <= 2 * counts[0]
    # The reentrant kind computes its value without a graph, where samples that have converged leave the batch.
    allowed = 1e-3 if reentrant else 0
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed)
    assert not torch.allclose(results[0][0], region(used), atol=1e-2)  # the masks matter


def test_running_statistics_do_not_disturb_the_recomputation():
    torch.manual_seed(0)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(5), nn.Linear(5, 5)

        def forward(self, z, x):
            return 0.3 * torch.tanh(self.norm(self.linear(z) + x))

    layer = Equilibrium(Normed(), stop=TIGHT, gradient=Implicit(stop=TIGHT), coupled=True).double()
    results = [gradients(lambda x: layer(x).output, inputs(6, 5), layer.parameters(), how=how) for how in (None, False)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_measures_inside_a_checkpoint():
    layer = layer_of()

    def region(x):
        out = layer(x)
        generator = torch.Generator().manual_seed(0)
        radius = spectral_radius(out.f, out.z, generator=generator, iterations=5)
        assert check_independence(out.f, out.z, generator=generator).independent
        penalty = jacobian_penalty(out.f, out.z.detach(), generator=generator)
        return out.output + penalty.mean() + radius.detach().mean()

    evals, value, expected = counts_and_gradients(layer, how=None, region=region)
    again, found_value, found = counts_and_gradients(layer, how=False, region=region)
    assert again <= 2 * evals
    assert torch.equal(value, found_value)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_other_hooks_unpack_each_tensor_once_per_backward_pass():
    layer, x = layer_of(), inputs(4, 5)
    layer(x).output.square().sum().backward()
    expected, unpacked = x.grad.clone(), []

    def unpack(packed):
        unpacked.append(id(packed))
        return packed[0].clone()

    x.grad = None
    with saved_tensors_hooks(lambda tensor: [tensor.clone()], unpack):
        value = layer(x).output
    value.square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert len(unpacked) == len(set(unpacked)) > 0
    x.grad = None
    with save_on_cpu():
        value = layer(x).output
    value.square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_the_graph_of_f_is_not_kept_between_the_passes():
    """A wide f: its graph is what a checkpoint is for."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4000), nn.Tanh(), nn.Linear(4000, 8))
    peaks, x = [], torch.randn(20, 8, requires_grad=True)

    def f(z, x):
        return 0.1 * torch.tanh(wide(z)) + x

    for checkpointed in (False, True):
        with PeakMemory() as memory:
            h = x
            for _ in range(6):

                def region(h):
                    return fixed_point(f, torch.zeros_like(h), h).z

                h = checkpoint(region, h, use_reentrant=False) if checkpointed else region(h)
            h.sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 0.5 * peaks[0]
