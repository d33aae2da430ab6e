"""CellSuite: the laws that every cell must keep. It needs pytest."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from equilibria.core.state import Layout, State
from equilibria.core.stop import Stop
from equilibria.core.trees import map_pairs, map_tensors, take_rows, tensors_in
from equilibria.fixed_point import Method
from equilibria.gradients.reversible import ReversibleGradient
from equilibria.gradients.unroll import Unroll
from equilibria.layers.cell import Cell, CellMap, Prepared
from equilibria.layers.equilibrium import Equilibrium
from equilibria.solvers.reversible import Reversible

BATCH = 2


class CellSuite:
    """Inherit it in a class ``TestMine`` and supply ``make`` and ``inputs``: pytest then runs every law on the cell.

    The suite draws states with the shape of ``cell.start`` and asks the cell for everything else.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64, torch.bfloat16)
    """Dtypes in which the cell computes."""
    twice_differentiable: ClassVar[bool] = True
    """False for a cell with fused kernels, which have no second derivative."""
    forward_mode: ClassVar[bool] = True
    """False for a cell whose operations have no forward-mode derivative."""
    coupled_in_training: ClassVar[bool] = False
    """True for a cell that mixes the samples in training, as batch norm does, and is solved with ``coupled=True``."""

    def make(self) -> Cell:
        """A cell in float64 whose random parameters are large enough for every path to show."""
        raise NotImplementedError

    def inputs(self, batch: int) -> tuple[Any, ...]:
        """Random inputs of the cell in float64, new ones at each call."""
        raise NotImplementedError

    def _cell(self, *, training: bool = False, dtype: torch.dtype = torch.float64) -> Cell:
        return self.make().to(dtype).train(training)

    def _arguments(self, cell: Cell, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of ``prepare``; those of a sequence cell include a past."""
        return inputs

    def _prepared(self, cell: Cell, inputs: tuple[Any, ...]) -> Prepared:
        return cell.prepare(*self._arguments(cell, inputs))

    def _state(self, cell: Cell, prepared: Prepared) -> State:
        """A random state."""
        return map_tensors(torch.randn_like, cell.begin(prepared, None))

    def _point(self, *, training: bool = False, batch: int = BATCH) -> tuple[Cell, Prepared, State]:
        cell = self._cell(training=training)
        prepared = self._prepared(cell, self.inputs(batch))
        return cell, prepared, self._state(cell, prepared)

    def test_f_gives_the_same_bits_twice(self) -> None:
        """It also draws no random numbers, not even in training."""
        cell, prepared, z = self._point(training=True)
        before = torch.get_rng_state()
        first, second = cell(z, prepared), cell(map_tensors(torch.clone, z), prepared)
        assert_same_bits(first, second)
        assert torch.equal(before, torch.get_rng_state())

    def test_f_does_not_change_its_argument(self) -> None:
        """z has the same bits after the call, and after ``output``; so have the inputs after ``prepare``."""
        for training in (True, False):
            cell, inputs = self._cell(training=training), self.inputs(BATCH)
            copies = map_tensors(torch.clone, inputs)
            prepared = self._prepared(cell, inputs)
            z = self._state(cell, prepared)
            assert_same_bits(inputs, copies)
            copies = map_tensors(torch.clone, z)
            cell.output(cell(z, prepared))
            cell.output(z)
            assert_same_bits(z, copies)

    def test_keeps_structure_shape_and_dtype(self) -> None:
        """f of a state is a state of the same kind, finite, in every dtype."""
        for dtype in self.dtypes:
            cell = self._cell(training=True, dtype=dtype)
            prepared = self._prepared(cell, cast(self.inputs(BATCH), dtype))
            z0 = cell.begin(prepared, None)
            fz = Layout.of(z0).aligned(cell(z0, prepared))
            for a, b in zip(tensors_in(z0), tensors_in(fz), strict=True):
                assert a.shape == b.shape
                assert a.dtype == b.dtype == dtype
                assert b.isfinite().all()
            cell.output(fz)

    def test_evaluation_draws_nothing(self) -> None:
        """Two evaluations agree, and the random generator is untouched."""
        cell, inputs = self._cell(), self.inputs(BATCH)
        before = torch.get_rng_state()
        first, second = (cell(self._start(cell, inputs), cell.prepare(*inputs)) for _ in range(2))
        assert_same_bits(first, second)
        assert_same_bits(*(cell.output(map_tensors(torch.clone, first)) for _ in range(2)))
        assert torch.equal(before, torch.get_rng_state())

    def _start(self, cell: Cell, inputs: tuple[Any, ...]) -> State:
        return cell.begin(cell.prepare(*inputs), None)

    def test_samples_are_independent(self) -> None:
        """A sample alone has the value and the start that it has in a batch."""
        cell, inputs = self._cell(), self.inputs(3)
        index = torch.tensor([2])
        prepared, single = cell.prepare(*inputs), cell.prepare(*take_rows(inputs, index))
        z = self._state(cell, prepared)
        assert_states_close(cell(take_rows(z, index), single), take_rows(cell(z, prepared), index), tolerance=1e-13)
        start = take_rows(cell.begin(prepared, None), index)
        assert_states_close(cell.begin(single, None), start, tolerance=1e-13)

    def test_samples_are_independent_in_training(self) -> None:
        """f of a sample has no derivative by the states and the inputs of the others."""
        if self.coupled_in_training:
            pytest.skip("the cell mixes the samples in training")
        cell, inputs = self._cell(training=True), self.inputs(3)
        floating = requiring_gradient(inputs)
        prepared = self._prepared(cell, inputs)
        z = self._state(cell, prepared)
        states = requiring_gradient(z)
        total = torch.stack([(leaf[0] * torch.randn_like(leaf[0])).sum() for leaf in tensors_in(cell(z, prepared))])
        wanted = [*states, *(leaf for leaf in floating if leaf.ndim and len(leaf) == 3)]
        for found in torch.autograd.grad(total.sum(), wanted, materialize_grads=True, allow_unused=True):
            assert not found[1:].any()

    def test_chosen_samples_have_the_values_that_they_have_in_the_batch(self) -> None:
        """The prepared values can be narrowed to samples, repeatedly, if the cell supports it."""
        cell, prepared, z = self._point(training=True, batch=4)
        self._check_rows(cell, prepared, z)

    def _check_rows(self, cell: Cell, prepared: Prepared, z: State) -> None:
        with torch.no_grad():
            f, index = CellMap(cell, prepared), torch.tensor([3, 0])
            narrowed = f.rows(index)
            if narrowed is None:
                return
            whole = take_rows(f(z), index)
            assert_states_close(narrowed(take_rows(z, index)), whole, tolerance=1e-12)
            third = f.rows(torch.tensor([3, 1, 0]))
            twice = None if third is None else third.rows(torch.tensor([0, 2]))
            assert twice is not None
            assert_states_close(twice(take_rows(z, index)), whole, tolerance=1e-12)

    def test_every_parameter_and_input_gets_a_gradient(self) -> None:
        """All gradients are finite and not zero, those of z included."""
        cell, inputs = self._cell(training=True), self.inputs(BATCH)
        floating = requiring_gradient(inputs)
        prepared = self._prepared(cell, inputs)
        z = self._state(cell, prepared)
        states, fz = requiring_gradient(z), cell(z, prepared)
        leaves = tensors_in(fz)
        torch.autograd.backward(leaves, [torch.randn_like(leaf) for leaf in leaves])
        for name, tensor in named(cell, inputs=floating, states=states):
            assert tensor.grad is not None, name
            assert tensor.grad.isfinite().all(), name
            assert tensor.grad.abs().max() > 0, name
        assert any(leaf.requires_grad for leaf in tensors_in(cell.output(fz))), "the output"

    def test_gradients_are_the_derivatives(self) -> None:
        """The gradients of all parameters, inputs and states agree with finite differences."""
        cell, inputs = self._cell(training=True), self.inputs(BATCH)
        floating, arguments = requiring_gradient(inputs), self._arguments(cell, inputs)
        random = torch.get_rng_state()
        z = self._state(cell, cell.prepare(*arguments))
        states, h = requiring_gradient(z), 1e-6
        weights = map_tensors(torch.randn_like, z)
        buffers = [(buffer, buffer.clone()) for buffer in cell.buffers()]

        def total() -> Tensor:
            torch.set_rng_state(random)  # the same masks
            for buffer, first in buffers:
                buffer.detach().copy_(first)
            return sum_of_products(cell(z, cell.prepare(*arguments)), weights)

        tensors = named(cell, inputs=floating, states=states)
        found = torch.autograd.grad(total(), [tensor for _, tensor in tensors], materialize_grads=True)
        for (name, tensor), gradient in zip(tensors, found, strict=True):
            v, values = torch.randn_like(tensor), []
            with torch.no_grad():
                for step in (h, -2 * h):
                    tensor.add_(v, alpha=step)
                    values.append(total())
                tensor.add_(v, alpha=h)
            expected = (values[0] - values[1]) / (2 * h)
            assert_close((gradient * v).sum(), expected, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")

    def test_forward_mode_is_the_derivative(self) -> None:
        """J·v agrees with finite differences."""
        if not self.forward_mode:
            pytest.skip("the cell has no forward-mode derivative")
        cell, prepared, z = self._point(training=True)
        f, v, h = CellMap(cell, prepared), map_tensors(torch.randn_like, z), 1e-6
        ahead, back = (f(map_pairs(lambda a, b, s=s: a + s * h * b, z, v)) for s in (1, -1))
        expected = map_pairs(lambda a, b: (a - b) / (2 * h), ahead, back)
        assert_states_close(f.jvp(z, v), expected, tolerance=1e-6)

    def test_second_derivatives(self) -> None:
        """They agree with finite differences; a Jacobian penalty needs them."""
        if not self.twice_differentiable:
            pytest.skip("the cell has no second derivative")
        cell, prepared, z = self._point(training=True)
        layout = Layout.of(z)
        flat = layout.pack(z).detach().requires_grad_()

        def f(rows: Tensor) -> Tensor:
            return layout.pack(layout.aligned(cell(layout.unpack(rows), prepared)))

        assert torch.autograd.gradgradcheck(f, (flat,), atol=1e-4, fast_mode=True)

    def test_copies_and_pickles_after_use(self) -> None:
        """Copies give the same values, and no module keeps a tensor of a forward pass."""
        cell, inputs = self._cell(), self.inputs(BATCH)
        start = self._start(cell, inputs)
        prepared = cell.prepare(*inputs)
        fz = cell(start, prepared)
        cell.remember(fz, prepared)
        for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert_states_close(other(start, other.prepare(*inputs)), fz, tolerance=0)
        for module in cell.modules():
            own = {name: value for name, value in vars(module).items() if name not in _REGISTERED}
            assert not tensors_in(own)

    def test_changed_weights_count_at_once(self) -> None:
        """A cell that has been used has the values of one that has not, after the same change of the parameters."""
        cell, inputs = self._cell(), self.inputs(BATCH)
        other, start = copy.deepcopy(cell), self._start(cell, inputs)
        with torch.no_grad():
            cell(start, cell.prepare(*inputs))
            for one, two in zip(cell.parameters(), other.parameters(), strict=True):
                change = 0.1 * torch.rand_like(one)
                one.add_(change)
                two.add_(change)
            assert_states_close(cell(start, cell.prepare(*inputs)), other(start, other.prepare(*inputs)), tolerance=0)

    def test_undone_steps_give_the_gradient_of_the_unrolled_ones(self) -> None:
        """``ReversibleGradient`` sees every tensor that f reads."""
        cell, stop = self._cell(training=True), Stop(rtol=0, atol=0, max_evals=7, best=False)
        inputs, found = self.inputs(BATCH), []
        floating = requiring_gradient(inputs)
        for rule in (Unroll(), ReversibleGradient()):
            torch.manual_seed(0)  # the same masks
            z = Equilibrium(cell)(*inputs, method=Method(Reversible(0.5), stop, rule)).z
            loss = torch.stack([leaf.sum() for leaf in tensors_in(z)]).sum()
            leaves = [*floating, *cell.parameters()]
            found.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for one, other in zip(*found, strict=True):
            assert_close(one, other, rtol=1e-6, atol=1e-8)


_REGISTERED = ("_parameters", "_buffers", "_modules")


def requiring_gradient(tree: Any) -> list[Tensor]:
    """Make the floating tensors of a tree require a gradient; returns these tensors."""
    return [leaf.requires_grad_() for leaf in tensors_in(tree) if leaf.is_floating_point()]


def named(cell: Cell, *, inputs: list[Tensor], states: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The parameters of the cell, the inputs and the leaves of the state, with their names."""
    others = [(kind, tensors) for kind, tensors in (("input", inputs), ("state", states))]
    return [*cell.named_parameters(), *((f"{kind} {i}", t) for kind, tensors in others for i, t in enumerate(tensors))]


def sum_of_products(a: State, b: State) -> Tensor:
    """The inner product of two states."""
    pairs = zip(tensors_in(a), tensors_in(Layout.of(a).aligned(b)), strict=True)
    return torch.stack([(one * other).sum() for one, other in pairs]).sum()


def assert_same_bits(a: Any, b: Any) -> None:
    """Two trees have equal tensors."""
    assert all(torch.equal(one, other) for one, other in zip(tensors_in(a), tensors_in(b), strict=True))


def cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The inputs with their floating tensors in ``dtype``."""
    return map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, inputs)


def assert_states_close(a: State, b: State, *, tolerance: float) -> None:
    """Two states are equal up to a relative and absolute ``tolerance``, leaf by leaf."""
    for one, other in zip(tensors_in(a), tensors_in(Layout.of(a).aligned(b)), strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance)
