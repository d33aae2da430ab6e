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

    def make(self) -> Cell:
        """A cell in float64 whose random parameters are large enough for every path to show."""
        raise NotImplementedError

    def inputs(self, batch: int) -> tuple[Any, ...]:
        """Random inputs of the cell in float64, new ones at each call."""
        raise NotImplementedError

    def _cell(self, *, training: bool = False, dtype: torch.dtype = torch.float64) -> Cell:
        return self.make().to(dtype).train(training)

    def _prepared(self, cell: Cell, inputs: tuple[Any, ...]) -> Prepared:
        """The prepared values of the cell; those of a sequence cell include a past."""
        return cell.prepare(*inputs)

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
        assert all(torch.equal(a, b) for a, b in zip(tensors_in(first), tensors_in(second), strict=True))
        assert torch.equal(before, torch.get_rng_state())

    def test_f_does_not_change_its_argument(self) -> None:
        """z has the same bits after the call."""
        cell, prepared, z = self._point(training=True)
        copies = map_tensors(torch.clone, z)
        cell(z, prepared)
        assert all(torch.equal(a, b) for a, b in zip(tensors_in(z), tensors_in(copies), strict=True))

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
        assert all(torch.equal(a, b) for a, b in zip(tensors_in(first), tensors_in(second), strict=True))
        assert torch.equal(before, torch.get_rng_state())

    def _start(self, cell: Cell, inputs: tuple[Any, ...]) -> State:
        return cell.begin(cell.prepare(*inputs), None)

    def test_samples_are_independent(self) -> None:
        """A sample alone has the value that it has in a batch."""
        cell, inputs = self._cell(), self.inputs(3)
        index = torch.tensor([2])
        prepared = cell.prepare(*inputs)
        z = self._state(cell, prepared)
        alone = cell(take_rows(z, index), cell.prepare(*take_rows(inputs, index)))
        assert_states_close(alone, take_rows(cell(z, prepared), index), tolerance=1e-13)

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
        cell = self._cell(training=True)
        inputs = self.inputs(BATCH)
        floating = [leaf for leaf in tensors_in(inputs) if leaf.is_floating_point()]
        for leaf in floating:
            leaf.requires_grad_()
        prepared = self._prepared(cell, inputs)
        z = map_tensors(lambda leaf: leaf.detach().requires_grad_(), self._state(cell, prepared))
        fz = tensors_in(cell(z, prepared))
        torch.autograd.backward(fz, [torch.randn_like(leaf) for leaf in fz])
        wanted = [*cell.named_parameters(), *((f"input {i}", t) for i, t in enumerate(floating))]
        for name, tensor in [*wanted, *((f"state {i}", t) for i, t in enumerate(tensors_in(z)))]:
            assert tensor.grad is not None, name
            assert tensor.grad.isfinite().all(), name
            assert tensor.grad.abs().max() > 0, name

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
        fz = cell(start, cell.prepare(*inputs))
        for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert_states_close(other(start, other.prepare(*inputs)), fz, tolerance=0)
        for module in cell.modules():
            assert not any(isinstance(value, Tensor) for value in vars(module).values())

    def test_undone_steps_give_the_gradient_of_the_unrolled_ones(self) -> None:
        """``ReversibleGradient`` sees every tensor that f reads."""
        cell, stop = self._cell(training=True), Stop(rtol=0, atol=0, max_evals=7, best=False)
        inputs, found = self.inputs(BATCH), []
        floating = [leaf.requires_grad_() for leaf in tensors_in(inputs) if leaf.is_floating_point()]
        for rule in (Unroll(), ReversibleGradient()):
            torch.manual_seed(0)  # the same masks
            z = Equilibrium(cell)(*inputs, method=Method(Reversible(0.5), stop, rule)).z
            loss = torch.stack([leaf.sum() for leaf in tensors_in(z)]).sum()
            leaves = [*floating, *cell.parameters()]
            found.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for one, other in zip(*found, strict=True):
            assert_close(one, other, rtol=1e-6, atol=1e-8)


def cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The inputs with their floating tensors in ``dtype``."""
    return map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, inputs)


def assert_states_close(a: State, b: State, *, tolerance: float) -> None:
    """Two states are equal up to a relative and absolute ``tolerance``, leaf by leaf."""
    for one, other in zip(tensors_in(a), tensors_in(Layout.of(a).aligned(b)), strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance)
