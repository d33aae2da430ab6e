"""The normal equations of one sample, by numbers, are those of a batch, by tensors."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from equilibria.core.evaluator import Evaluator
from equilibria.core.maps import as_map
from equilibria.core.solve import solve
from equilibria.core.solver import Iterate
from equilibria.core.state import Layout
from equilibria.core.stop import Stop
from equilibria.solvers.anderson import FEW, Anderson, NormalOfBatch, NormalOfOne, empty_normal
from equilibria.solvers.history import ridge_solve


def both(size, width=12, *, dtype=torch.float64):
    one, many = empty_normal(torch.zeros(1, width, dtype=dtype), size), empty_normal(torch.zeros(2, width), size)
    assert isinstance(one, NormalOfOne)
    assert isinstance(many, NormalOfBatch)
    return one, NormalOfBatch(many.gram[:1], many.along[:1])


@pytest.mark.parametrize("change", [lambda dr, step: dr, lambda dr, step: dr * (step % 2)], ids=["any", "some are 0"])
@pytest.mark.parametrize("size", [1, 2, 5, FEW])
def test_numbers_give_the_weights_of_tensors(size, change):
    torch.manual_seed(0)
    one, many = both(size)
    window, r = torch.zeros(1, size, 12, dtype=torch.float64), torch.randn(1, 12, dtype=torch.float64)
    for step in range(3 * size):
        slot, used = step % size, min(step + 1, size)
        dr = change(torch.randn(1, 12, dtype=torch.float64), step)
        window[:, slot], r = dr, r + dr
        one, many = one.updated(window[:, :used], slot, r), many.updated(window[:, :used], slot, r)
        found, wanted = (normal.weights(ridge=1e-7, tiny=False, like=r) for normal in (one, many))
        assert found.shape == (1, used)
        assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_a_system_that_is_not_finite_has_weights_of_0():
    for normal in both(2):
        window = torch.full((1, 1, 12), math.nan, dtype=torch.float64)
        weights = normal.updated(window, 0, torch.ones(1, 12, dtype=torch.float64)).weights(
            ridge=1e-7, tiny=False, like=window
        )
        assert weights.tolist() == [[0.0]]


def test_many_unknowns_and_many_samples_are_tensors():
    assert isinstance(empty_normal(torch.zeros(1, 40), FEW + 1), NormalOfBatch)
    assert isinstance(empty_normal(torch.zeros(2, 40), 5), NormalOfBatch)
    assert isinstance(empty_normal(torch.zeros(1, 40, requires_grad=True), 5), NormalOfBatch)


@pytest.mark.parametrize("recorded", [1, 3, 7])
def test_steps_that_autograd_records_after_others_get_the_gradient_of_tensors(recorded):
    torch.manual_seed(0)
    matrix, offset = 0.3 * torch.randn(9, 9, dtype=torch.float64), torch.randn(1, 9, dtype=torch.float64)
    solver, grads = Anderson(), []
    for numbers in (True, False):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        z = torch.zeros(1, 9, dtype=torch.float64)
        f = Evaluator(as_map(lambda z, s=scale: torch.tanh(z @ matrix) + s * offset), Layout.of(z), 99)
        history = solver.init(z)
        assert isinstance(history.normal, NormalOfOne)
        if not numbers:
            products = NormalOfBatch(gram=z.new_zeros(1, 5, 5), along=z.new_zeros(1, 0))
            history = dataclasses.replace(history, normal=products)
        for step in range(9):
            with torch.set_grad_enabled(step >= recorded):
                fz = f(z)
                at = Iterate(z=z, fz=fz, r=fz - z, active=torch.ones(1, dtype=torch.bool))
                z, history = solver.step(f, at, history)
            assert isinstance(history.normal, NormalOfOne) == (numbers and step < recorded)
        grads += torch.autograd.grad(z.sum(), scale)
    assert grads[0] != 0
    assert_close(*grads)


def test_the_quick_solution_of_a_regular_system_has_the_bits_of_the_careful_one():
    torch.manual_seed(0)
    window = torch.randn(3, 5, 12, dtype=torch.float64)
    gram, target = torch.bmm(window, window.mT), torch.randn(3, 5, dtype=torch.float64)
    quick = ridge_solve(gram, target, ridge=1e-7)
    with_an_empty_one = torch.cat([gram, torch.zeros(1, 5, 5, dtype=torch.float64)])
    careful = ridge_solve(with_an_empty_one, torch.cat([target, 0 * target[:1]]), ridge=1e-7)
    assert torch.equal(quick, careful[:3])
    assert careful[3].tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_alone_takes_the_steps_that_it_takes_in_a_batch(dtype):
    torch.manual_seed(0)
    matrix, offset = 0.9 * torch.linalg.qr(torch.randn(12, 12, dtype=dtype))[0], torch.randn(2, 12, dtype=dtype)
    stop = Stop(rtol=1e-5)
    with torch.no_grad():
        together = solve(lambda z: torch.tanh(z @ matrix) + offset, torch.zeros(2, 12, dtype=dtype), Anderson(), stop)
        alone = solve(lambda z: torch.tanh(z @ matrix) + offset[:1], torch.zeros(1, 12, dtype=dtype), Anderson(), stop)
    assert alone.steps[0] == together.steps[0]
    assert_close(alone.z[0], together.z[0], rtol=1e-5, atol=1e-5)
