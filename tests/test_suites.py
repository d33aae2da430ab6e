"""The conformance suites catch wrong cells and solvers: one plausible mistake for each law that seems easy to pass."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from torch import nn

from equilibria import Cell, Prepared, Solver
from equilibria.layers.dropout import dropout_mask
from equilibria.layers.sequence import SequenceCell
from equilibria.testing import CellSuite, SequenceCellSuite, SolverSuite

WIDTH = 4


class Right(Cell):
    """f(z) = tanh(½ A z + U x)."""

    def __init__(self):
        super().__init__()
        self.state, self.input = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen, self.held = [], Memo()

    def prepare(self, x):
        return Prepared(rows=self.input(x))

    def start(self, prepared):
        return torch.zeros_like(prepared.rows)

    def forward(self, z, prepared):
        return torch.tanh(0.5 * self.state(z) + prepared.rows)


class Memo:
    """A value that copies of its module do not share."""

    value = None

    def __deepcopy__(self, memo):
        return Memo()


class Centred(Right):
    def prepare(self, x):
        return super().prepare(x - x.mean(0) if self.training else x)


class BatchStatistics(Right):
    def prepare(self, x):
        return Prepared(shared=(self.input(x),))

    def start(self, prepared):
        return torch.zeros_like(prepared.shared[0])

    def forward(self, z, prepared):
        fz = torch.tanh(0.5 * self.state(z) + prepared.shared[0])
        return fz - 0.1 * fz.mean(0) if self.training else fz


class StartOfTheFirst(Right):
    def start(self, prepared):
        return prepared.rows[:1].expand_as(prepared.rows)


class OldWeights(Right):
    def prepare(self, x):
        if self.held.value is None:
            self.held.value = self.input.weight.detach().clone()
        return Prepared(rows=x @ self.held.value.mT + self.input.bias)


class Recorded(Right):
    def forward(self, z, prepared):
        self.seen.append(z.detach())
        return super().forward(z, prepared)


class HalfDetached(Right):
    def prepare(self, x):
        return Prepared(rows=self.input(x) + x @ self.state.weight.detach())


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * ctx.saved_tensors[0].sin()


class WrongBackward(Right):
    def forward(self, z, prepared):
        return Sine.apply(super().forward(z, prepared))


class ClampedInput(Right):
    def prepare(self, x):
        return super().prepare(x.clamp_(max=0.5))


class ClampedOutput(Right):
    def output(self, z):
        return z.clamp_(max=0)


class RandomOutput(Right):
    def output(self, z):
        return nn.functional.dropout(z, 0.5)


class DetachedOutput(Right):
    def output(self, z):
        return z.detach()


CELLS = [
    (Centred, "test_samples_are_independent_in_training"),
    (BatchStatistics, "test_samples_are_independent_in_training"),
    (StartOfTheFirst, "test_samples_are_independent"),
    (OldWeights, "test_changed_weights_count_at_once"),
    (Recorded, "test_copies_and_pickles_after_use"),
    (HalfDetached, "test_gradients_are_the_derivatives"),
    (WrongBackward, "test_gradients_are_the_derivatives"),
    (ClampedInput, "test_f_does_not_change_its_argument"),
    (ClampedOutput, "test_f_does_not_change_its_argument"),
    (RandomOutput, "test_evaluation_draws_nothing"),
    (DetachedOutput, "test_every_parameter_and_input_gets_a_gradient"),
]


class OfCells(CellSuite):
    def __init__(self, cell):
        self.make = lambda: cell().double()

    def inputs(self, batch):
        return (torch.randn(batch, 3, WIDTH, dtype=torch.float64),)


@pytest.mark.parametrize(("cell", "law"), CELLS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_cell_is_caught(cell, law):
    getattr(OfCells(Right), law)()
    with pytest.raises(AssertionError):
        getattr(OfCells(cell), law)()


class Mean(SequenceCell):
    """f(z)_t = tanh(0.3 A z_t + 0.3 B mean_{s ≤ t} z_s + U x_t), with a memory of 16 positions."""

    def __init__(self):
        super().__init__()
        self.own, self.mean, self.input = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def prepare(self, x, memory=None, *, warm=False, part=None, key_padding_mask=None):
        past, known = (x[:, :0], x.new_zeros(len(x), 0, dtype=torch.bool)) if memory is None else memory
        valid = x.new_ones(x.shape[:2], dtype=torch.bool) if key_padding_mask is None else ~key_padding_mask
        mask = dropout_mask((len(x), 1, WIDTH), rate=0.3, training=self.training, like=x, part=part)
        inputs = self.input(x) if mask is None else self.input(x) * mask
        return Prepared(rows=(inputs, past, torch.cat([known, valid], dim=1)))

    def start(self, prepared):
        return torch.zeros_like(prepared.rows[0])

    def forward(self, z, prepared):
        inputs, past, valid = prepared.rows
        before, time = past.shape[1], z.shape[1]
        weights = torch.ones(time, before + time, dtype=z.dtype).tril(before) * valid[:, None].to(z.dtype)
        mean = weights @ torch.cat([past, z], dim=1) / weights.sum(2, keepdim=True).clamp_min(1)
        return torch.tanh(0.3 * self.own(z) + 0.3 * self.mean(mean) + inputs) * valid[:, before:, None]

    def remember(self, z, prepared):
        past, valid = torch.cat([prepared.rows[1], z], dim=1).detach(), prepared.rows[2]
        return past[:, -16:], valid[:, -16:]


class FutureState(Mean):
    def forward(self, z, prepared):
        return super().forward(z + 0.1 * z.flip(1) if self.training else z, prepared)


class FutureInput(Mean):
    def prepare(self, x, *more, **options):
        return super().prepare(x + x.flip(1) if self.training else x, *more, **options)


class OneSegment(Mean):
    def remember(self, z, prepared):
        return z.detach(), prepared.rows[2][:, -z.shape[1] :]


class MixedMemories(Mean):
    def prepare(self, x, memory=None, **options):
        return super().prepare(x, None if memory is None else (memory[0] - memory[0].mean(0), memory[1]), **options)


class OwnMasks(Mean):
    def prepare(self, x, memory=None, *, part=None, **options):
        return super().prepare(x, memory, **options)


class NoPaddingInCache(Mean):
    def cache(self, batch, *, memory=None, **options):
        return memory


class MaskOfMemory(Mean):
    def prepare(self, x, memory=None, *, key_padding_mask=None, **options):
        return super().prepare(x, memory, key_padding_mask=None if memory else key_padding_mask, **options)


SEQUENCES = [
    (FutureState, "test_causal", (False, True)),
    (FutureInput, "test_causal", (True, True)),
    (OneSegment, "test_segment_law_of_the_map", ()),
    (MixedMemories, "test_streams_with_a_memory_are_independent", ()),
    (OwnMasks, "test_a_part_of_a_batch_draws_the_numbers_of_the_whole", ()),
    (NoPaddingInCache, "test_a_cache_with_padding_ignores_it", None),
    (MaskOfMemory, "test_padding_after_a_remembered_text_changes_nothing", ()),
]


class OfSequenceCells(OfCells, SequenceCellSuite):
    def inputs(self, batch, time=None):
        return (torch.randn(batch, time or self.time, WIDTH, dtype=torch.float64),)


@pytest.mark.parametrize(("cell", "law", "given"), SEQUENCES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_sequence_cell_is_caught(cell, law, given):
    if given is not None:  # ``Mean`` has no cache with padding
        getattr(OfSequenceCells(Mean), law)(*given)
    with pytest.raises(AssertionError):
        getattr(OfSequenceCells(cell), law)(*(given or ()))


@dataclasses.dataclass(frozen=True)
class Momentum(Solver):
    """z ← f(z) + 0.2·(z − z₋)."""

    def init(self, z):
        return z

    def step(self, f, at, history):
        return at.fz + 0.2 * (at.z - history), at.z


class FirstRows(Momentum):
    def select(self, history, rows):
        return history[: len(rows)]


class Detached(Momentum):
    def step(self, f, at, history):
        return (at.fz + 0.2 * (at.z - history)).detach(), at.z.detach()


class InPlace(Momentum):
    def step(self, f, at, history):
        return at.fz.lerp_(at.z, 0.1), at.z


class OverwrittenStart(Momentum):
    def step(self, f, at, history):
        following = at.fz + 0.2 * (at.z - history)
        return following, history.copy_(at.z)


class Costly(Momentum):
    cost: ClassVar[int] = 4


class ByRow(Momentum):
    by_row: ClassVar[bool] = True

    def step(self, f, at, history):
        return at.z.lerp(at.fz, 1 - 1 / len(at.z)), at.z


class Secant(Momentum):
    def init(self, z):
        return None

    def step(self, f, at, history):
        if history is None:
            return at.fz, (at.fz, at.r)
        change = at.r - history[1]
        factor = (at.r * change).sum(1, keepdim=True) / change.square().sum(1, keepdim=True)
        return at.fz - factor * (at.fz - history[0]), (at.fz, at.r)


class Noisy(Momentum):
    def step(self, f, at, history):
        return at.fz * (1 + 1e-12 * torch.randn(1).item()), at.z


class Deviation(Momentum):
    def step(self, f, at, history):
        spread = (at.r - at.r.mean(1, keepdim=True)).square().sum(1, keepdim=True) / (at.r.shape[1] - 1)
        return at.z + at.r * (1 - 0 * spread), at.z


SOLVERS = [
    (FirstRows, "test_samples_that_leave_the_batch_change_nothing", ("rotation, radius 0.7",)),
    (Detached, "test_back_propagation_through_the_steps", ()),
    (InPlace, "test_a_step_changes_no_number_that_it_is_given", ()),
    (OverwrittenStart, "test_a_step_changes_no_number_that_it_is_given", ()),
    (Costly, "test_the_least_cost_of_a_step", ()),
    (ByRow, "test_samples_solved_in_blocks_are_as_in_one_batch", None),
    (Secant, "test_a_sample_without_residual_stays_finite", ()),
    (Noisy, "test_the_same_bits_twice", ()),
    (Deviation, "test_states_of_few_numbers", (1,)),
]


class OfSolvers(SolverSuite):
    needs_contraction = True

    def __init__(self, solver):
        self.make = solver


@pytest.mark.parametrize(("solver", "law", "given"), SOLVERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_solver_is_caught(solver, law, given, monkeypatch):
    given = (monkeypatch,) if given is None else given
    getattr(OfSolvers(Momentum), law)(*given)
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(OfSolvers(solver), law)(*given)
