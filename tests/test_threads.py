"""Threads that share a layer or a model get what they get alone, or one sentence."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from equilibria import Equilibrium, Implicit, Phantom, Reversible, ReversibleGradient, Stop
from equilibria.cells.transformer.cache import KeyValueCache
from equilibria.layers.held import Held
from equilibria.lm.model import generate
from equilibria.lm.model.modes import in_mode
from equilibria.torch_private import own_parametrizations
from test_generate import V, built


class Normed(nn.Module):
    """tanh(BN(W z)/3 + x) with a parametrised W; ``then`` runs within its next evaluation."""

    def __init__(self):
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(4, 4).double())
        self.norm = nn.BatchNorm1d(4).double()
        self.then = None

    def forward(self, z, x):
        then, self.then = self.then, None
        if then is not None:
            then()
        return torch.tanh(self.norm(self.linear(z)) / 3 + x)


def in_threads(calls):
    """The result of each call, all of them at once, and the same one after the other."""
    alone = [call() for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        return [pool.submit(call) for call in calls], alone


METHODS = {
    "implicit": {},
    "phantom": {"gradient": Phantom(3)},
    "reversible": {"solver": Reversible(0.8), "gradient": ReversibleGradient(), "stop": Stop(0, max_evals=21)},
}


@pytest.mark.parametrize("name", METHODS)
def test_threads_differentiate_one_layer(name):
    layer = Equilibrium(Normed(), **METHODS[name]).eval()
    start = torch.zeros(3, 4).double()

    def gradients(x):
        found = torch.autograd.grad(layer(x, start=start).z.square().sum(), list(layer.parameters()))
        return torch.cat([gradient.flatten() for gradient in found])

    inputs = [torch.randn(3, 4).double() for _ in range(6)]
    together, alone = in_threads([lambda x=x: gradients(x) for x in inputs])
    for mine, expected in zip(together, alone, strict=True):
        assert torch.equal(mine.result(), expected)


def test_threads_differentiate_one_layer_twice():
    tight = Stop(1e-11, max_evals=100)
    layer = Equilibrium(Normed(), stop=tight, gradient=Implicit(stop=tight)).eval()

    def gradients(x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(x).z.square().sum(), x, create_graph=True)
        found = torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])
        return torch.cat([gradient.flatten() for gradient in found])

    inputs = [torch.randn(3, 4).double() for _ in range(6)]
    together, alone = in_threads([lambda x=x: gradients(x) for x in inputs])
    for mine, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(mine.result(), expected, rtol=1e-9, atol=1e-12)


def test_threads_that_write_the_buffers_of_one_layer_are_refused_and_no_buffer_is_lost():
    layer, x, errors = Equilibrium(Normed(), coupled=True), torch.randn(5, 4).double(), []
    cell, own = layer.cell.module, dict(layer.named_buffers())

    def other():
        with pytest.raises(RuntimeError, match=r"Two threads are training one ModuleCell.*copy\.deepcopy\(layer\)"):
            layer(x)
        errors.append("refused")

    def meet():
        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        thread.join(60)

    cell.then = meet
    z = layer(x).z
    assert errors == ["refused"]
    assert all(buffer is own[name] for name, buffer in layer.named_buffers())
    assert cell.norm.num_batches_tracked == 1
    assert torch.isfinite(z).all()
    layer(x)  # the claim has ended
    assert cell.norm.num_batches_tracked == 2


def test_threads_generate_from_one_model():
    model = built(positions="decay").eval()
    prompts = [torch.randint(V, (1 + i % 2, 3 + i)) for i in range(4)]

    def tokens(i):
        return generate(model, prompts[i], length=4, seed=i, memory_length=6 + 5 * i)

    together, alone = in_threads([lambda i=i: tokens(i) for i in range(4)])
    for mine, expected in zip(together, alone, strict=True):
        assert torch.equal(mine.result(), expected)


def test_the_mode_of_a_model_is_restored_by_the_last_thread():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    first, second = in_mode(model, training=False), in_mode(model, training=False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_modes_may_be_nested():
    model = nn.Dropout()
    with in_mode(model, training=False):
        with in_mode(model, training=True):
            with in_mode(model, training=False):
                assert not model.training
            assert model.training
        assert not model.training
    assert model.training


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_own_mode_of_a_model_is_restored_after_two_threads_with_different_modes(own, first):
    """In whatever order they end; the model stayed in the mode that the first one had asked for."""
    model = nn.Dropout().train(own)
    one, other = in_mode(model, training=first), in_mode(model, training=not first)
    one.__enter__()
    other.__enter__()
    assert model.training is not first
    one.__exit__(None, None, None)
    assert model.training is not first
    other.__exit__(None, None, None)
    assert model.training is own


def test_the_mode_of_a_model_is_restored_after_an_error():
    model = nn.Dropout()
    with pytest.raises(ValueError, match="inside"), in_mode(model, training=False), in_mode(model, training=True):
        raise ValueError("inside")
    assert model.training
    with in_mode(model.eval(), training=True):
        assert model.training
    assert not model.training


class Interrupted:
    """Equal to its like; another thread gets its turn while the two are compared."""

    def __init__(self, then=None):
        self.then = then

    def __eq__(self, other):
        if type(other) is not Interrupted:
            return False
        for one in (self, other):
            then, one.then = one.then, None
            if then is not None:
                then()
        return True

    __hash__ = None


def test_what_is_held_is_that_of_ones_own_choices():
    held, module = Held(), nn.Linear(1, 1)
    assert held.of(module, lambda: "first", Interrupted()) == "first"
    meanwhile = Interrupted(lambda: held.of(module, lambda: "second", 2))
    assert held.of(module, lambda: "first", meanwhile) == "first"
    assert meanwhile.then is None
    assert held.of(module, lambda: "again", 2) == "second"


def test_a_replica_of_data_parallel_does_not_get_the_weights_of_another():
    held, module = Held(), nn.Linear(1, 1)
    replicas = [module._replicate_for_data_parallel() for _ in range(2)]
    assert [held.of(replica, lambda i=i: i) for i, replica in enumerate(replicas)] == [0, 1]


@torch.no_grad()
def test_two_solves_that_continue_one_cache_write_separate_slots():
    """As those of two threads that share the cache of a prompt: both have begun before one of them has ended."""
    like, new = torch.zeros(1), torch.randn(4, 2, 3, 1, 5)  # H B T C for k and v of each
    prompt = KeyValueCache.empty(heads=2, batch=3, width=5, length=8, padding=None, like=like)
    prompt = prompt.with_room(4).advanced(torch.randn(2, 2, 3, 2, 5))
    first, second = prompt.with_room(1), prompt.with_room(1)
    (k, v), other = first.joined(new[0], new[1]), second.joined(new[2], new[3])
    for read, own in zip((k, v, *other), new, strict=True):
        assert torch.equal(read[:, :, 2:], own)
    kept = second.advanced(new[2:]), first.advanced(new[:2])
    for cache, pair in zip(kept, (new[2:], new[:2]), strict=True):
        assert torch.equal(cache.past[:, :, :, 2:], pair)


def test_parametrisation_caches_of_overlapping_solves_leave_nothing_behind():
    before = parametrize._cache
    first, second = own_parametrizations(), own_parametrizations()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert parametrize._cache is before
