"""The conformance suite of cells: every member of the catalogue keeps these laws."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.testing import assert_close

from equilibria import Anderson, Cell, Equilibrium, Implicit, Reversible, ReversibleGradient, Stop, Unroll
from equilibria.cells import CELLS, ChainShape, TransformerCell, TransformerShape, TrellisShape
from equilibria.training.nested import flatten

pytestmark = pytest.mark.parametrize("shape", CELLS, ids=lambda shape: repr(shape)[:40])
B, T = 2, 4


def built(shape, *, training=False, dtype=torch.float64):
    """A cell whose random numbers are large enough for every path to show."""
    cell = shape.build().to(dtype).train(training)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            if isinstance(shape, TransformerShape) and not name.endswith("gain"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if isinstance(shape, TrellisShape):
                parameter.add_(torch.rand_like(parameter) if name.endswith("gain") else torch.randn_like(parameter))
    return cell


def state_width(shape):
    return 2 * shape.channels if isinstance(shape, TrellisShape) else shape.width


def inputs(shape, *, time=T, dtype=torch.float64):
    return torch.randn(B, time, shape.width, dtype=dtype), torch.randn(B, time, state_width(shape), dtype=dtype)


def make_contraction(cell):
    """A strong input does it to a fresh transformer."""
    with torch.no_grad():
        for module in cell.modules():
            if isinstance(module, TransformerCell):
                if module.inject is not None:
                    module.inject.direction.mul_(300)
                if module.attention.norm is not None:
                    module.attention.out.gain.mul_(100)


def memory_of(cell, shape, *, time=T, dtype=torch.float64):
    x, z = inputs(shape, time=time, dtype=dtype)
    with torch.no_grad():
        return cell.remember(z, cell.prepare(x, None))


def test_same_bits_every_time(shape):
    cell = built(shape, training=True)
    x, z = inputs(shape)
    context = cell.prepare(x, memory_of(cell, shape))
    before = torch.get_rng_state()
    first, second = cell(z, context), cell(z.clone(), context)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn during a solve


def test_keeps_shape_and_dtype(shape):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        cell = built(shape, training=True, dtype=dtype)
        x, z = inputs(shape, dtype=dtype)
        context = cell.prepare(x, memory_of(cell, shape, dtype=dtype))
        z0 = cell.start(context)
        assert z0.shape == z.shape
        fz = cell(z0, context)
        assert fz.shape == z.shape
        assert cell.output(fz).shape == (B, T, shape.outputs)
        assert fz.dtype == dtype == z0.dtype
        assert torch.isfinite(fz).all()


def test_under_autocast(shape):
    cell = built(shape, training=True, dtype=torch.float32)
    x, z = inputs(shape, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = cell.prepare(x, memory_of(cell, shape, dtype=torch.float32))
        fz = cell(z, context)
        memory = cell.remember(fz, context)
        again = cell(fz, cell.prepare(x, memory))
    again.float().sum().backward()
    assert torch.isfinite(again).all()


@pytest.mark.parametrize("remembering", [False, True])
def test_causal(shape, remembering):
    cell = built(shape)
    x, z = inputs(shape)
    memory = memory_of(cell, shape) if remembering else None
    before = cell(z, cell.prepare(x, memory))
    for t in range(T):
        later_x, later_z = x.clone(), z.clone()
        later_x[:, t:] += 1
        later_z[:, t:] -= torch.randn_like(later_z[:, t:])
        after = cell(later_z, cell.prepare(later_x, memory))
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("past", ["none", "memory", "cache"])
def test_f_of_selected_samples_is_f_selected(shape, past):
    cell = built(shape, training=past != "cache")
    x, z = (torch.cat([part, part.flip(1)]) for part in inputs(shape))  # four samples
    memory, rows = None, torch.tensor([3, 0])
    with torch.no_grad():
        if past == "memory":
            memory = cell.remember(z.roll(1, 0), cell.prepare(x.roll(1, 0), None))
        if past == "cache" and type(cell).cache is not Cell.cache:
            memory = cell.cache(4, padding=torch.tensor([2, 0, 3, 1]))
        context = cell.prepare(x, memory)
        whole = cell(z, context)
        assert_close(cell(z[rows], cell.select(context, rows)), whole[rows], rtol=1e-12, atol=1e-12)
        twice = cell.select(cell.select(context, torch.tensor([3, 1, 0])), torch.tensor([0, 2]))
        assert_close(cell(z[rows], twice), whole[rows], rtol=1e-12, atol=1e-12)


def test_warm_starts_are_states_and_change_nothing_but_the_cost(shape):
    cell = built(shape)
    x, _ = inputs(shape)
    memory = memory_of(cell, shape)
    for remembered in (None, memory):
        context = cell.prepare(x, remembered)
        cold, warm = cell.start(context), cell.warm_start(context)
        assert warm.shape == cold.shape
        assert warm.dtype == cold.dtype
    if memory is None or isinstance(shape, ChainShape) or getattr(shape, "norm", "post") == "pre":
        return  # not known to have one equilibrium, and to find it
    make_contraction(cell)
    stop = Stop(rtol=1e-10, atol=0, max_evals=200)
    found = [Equilibrium(cell, Anderson(), stop, Implicit(), warm=warm)(x, memory) for warm in (False, True)]
    if all(out.solution.converged.all() for out in found):
        assert_close(found[0].z, found[1].z, rtol=1e-6, atol=1e-7)


def test_undone_steps_give_the_gradient_of_the_unrolled_ones(shape):
    cell, stop = built(shape, training=True), Stop(rtol=0, atol=0, max_evals=7, best=False)
    x, found = inputs(shape)[0].requires_grad_(), []
    for rule in (Unroll(), ReversibleGradient()):
        torch.manual_seed(0)  # the same masks
        out = Equilibrium(cell, Reversible(0.5), stop, rule)(x, memory_of(cell, shape))
        leaves = [x, *cell.parameters()]
        found.append(torch.autograd.grad(out.z.sum(), leaves, allow_unused=True, materialize_grads=True))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_samples_are_independent(shape):
    cell = built(shape)
    x, z = inputs(shape)
    both = cell(z, cell.prepare(x, None))
    alone = cell(z[1:], cell.prepare(x[1:], None))
    torch.testing.assert_close(alone, both[1:], rtol=0, atol=1e-14)


def test_every_parameter_gets_a_gradient(shape):
    cell = built(shape, training=True)
    x, z = inputs(shape, time=6)
    x.requires_grad_(), z.requires_grad_()
    fz = cell(z, cell.prepare(x, memory_of(cell, shape)))
    fz.backward(torch.randn_like(fz))
    for name, parameter in [*cell.named_parameters(), ("x", x), ("z", z)]:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_segment_law_of_the_map(shape):
    """f of two segments at once is f of the first, and f of the second after the first was remembered."""
    if isinstance(shape, TrellisShape) and shape.recurrence == "scan":
        pytest.skip("what one evaluation carries on is c of f(z), what is remembered c of z: equal at the equilibrium")
    cell = built(shape)
    x, z = inputs(shape, time=2 * T)
    joint = cell(z, cell.prepare(x, None))
    context = cell.prepare(x[:, :T], None)
    first = cell(z[:, :T], context)
    second = cell(z[:, T:], cell.prepare(x[:, T:], cell.remember(z[:, :T], context)))
    torch.testing.assert_close(torch.cat([first, second], dim=1), joint, rtol=0, atol=1e-12)


def test_segment_law_of_the_equilibrium(shape):
    """Solved in pieces of 1, 2 and 1 positions with memory, or at once: the same equilibrium."""
    if isinstance(shape, TransformerShape) and shape.norm == "pre":
        pytest.skip("the residual of the textbook's pre-norm grows without bound, so it need not have an equilibrium")
    cell = shape.build().double().eval()
    make_contraction(cell)
    layer = Equilibrium(cell, Anderson(), Stop(rtol=1e-13, atol=1e-13, max_evals=100), Implicit())
    x, _ = inputs(shape)
    memory, pieces = None, []
    with torch.no_grad():
        joint = layer(x)
        for piece in x.split([1, 2, 1], dim=1):
            out = layer(piece, memory)
            memory = out.memory
            pieces.append(out.z)
    assert joint.solution.converged.all()
    torch.testing.assert_close(torch.cat(pieces, dim=1), joint.z, rtol=0, atol=1e-10)


def test_memory_is_detached(shape):
    cell = built(shape)
    x, z = inputs(shape)
    memory = cell.remember(z.requires_grad_(), cell.prepare(x, None))
    assert not any(value.requires_grad for value in flatten(memory).values())


def test_jvp_is_the_derivative(shape):
    cell = built(shape, training=True)
    x, z = inputs(shape)
    context = cell.prepare(x, memory_of(cell, shape))
    v, h = torch.randn_like(z), 1e-6
    _, tangent = torch.func.jvp(lambda z: cell(z, context), (z,), (v,))
    expected = (cell(z + h * v, context) - cell(z - h * v, context)) / (2 * h)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7)


def test_second_derivatives(shape):
    cell = built(shape, training=True)
    x, z = inputs(shape, time=2)
    context = cell.prepare(x, memory_of(cell, shape))
    assert torch.autograd.gradgradcheck(lambda z: cell(z, context), (z.requires_grad_(),), atol=1e-4, fast_mode=True)


def test_copies_and_pickles_after_use(shape):
    cell = built(shape)
    x, z = inputs(shape)
    fz = cell(z, cell.prepare(x, None))
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert torch.equal(twin(z, twin.prepare(x, None)), fz)
    for module in cell.modules():
        assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())


def test_evaluation_draws_nothing(shape):
    cell = built(shape)
    x, z = inputs(shape)
    before = torch.get_rng_state()
    assert torch.equal(cell(z, cell.prepare(x, None)), cell(z, cell.prepare(x, None)))
    assert torch.equal(before, torch.get_rng_state())


def test_shape_is_frozen_and_complete(shape):
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.width = 3
    assert dataclasses.replace(shape) == shape == shape.build().shape
