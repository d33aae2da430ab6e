"""SequenceCellSuite: the laws that every cell on sequences must keep. It needs pytest.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from equilibria.core.stop import Stop
from equilibria.core.trees import take_rows, tensors_in
from equilibria.fixed_point import Method
from equilibria.layers.dropout import BatchSlice
from equilibria.layers.equilibrium import Equilibrium
from equilibria.layers.explicit import Stack, Unrolled
from equilibria.layers.sequence import Memory, SequenceCell
from equilibria.solvers.anderson import Anderson
from equilibria.testing.cells import BATCH, CellSuite, cast


class SequenceCellSuite(CellSuite):
    """Adds the laws of a ``SequenceCell``: causality, memory and generation. ``inputs`` takes a time as well."""

    segment_law: ClassVar[bool] = True
    """False for a cell that reads other values of a past segment than of its own: two segments are not one then."""
    segment_law_of_the_map: ClassVar[bool] = True
    """False for a cell whose f reads its own result at earlier times: then the law holds only at equilibrium."""
    padded_cache: ClassVar[bool] = True
    """False for a cell whose ``cache`` does not support texts of different lengths."""
    padding: ClassVar[bool] = True
    """False for a cell whose ``prepare`` has no ``key_padding_mask``."""
    time: ClassVar[int] = 4

    def make(self) -> SequenceCell:
        """A cell in float64 whose random parameters are large enough for every path to show."""
        raise NotImplementedError

    def make_contraction(self) -> SequenceCell | None:
        """A cell with one equilibrium that Anderson's method finds to 1e-13; None if there is no such cell."""
        return None

    def inputs(self, batch: int, time: int | None = None) -> tuple[Tensor]:
        """Random x ``[B T D]`` in float64, of ``self.time`` positions unless said otherwise."""
        raise NotImplementedError

    def _past(self, cell: Any, batch: int = BATCH, *, dtype: torch.dtype = torch.float64) -> Memory:
        (x,) = cast(self.inputs(batch), dtype)
        with torch.no_grad():
            prepared = cell.prepare(x)
            return cell.remember(self._state(cell, prepared), prepared)

    def _arguments(self, cell: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        (x,) = inputs
        return x, self._past(cell, len(x), dtype=x.dtype)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("remembering", [False, True])
    def test_causal(self, remembering: bool, training: bool) -> None:
        """Later positions do not affect earlier ones."""
        cell: Any = self._cell(training=training)
        (x,) = self.inputs(BATCH)
        memory, random = self._past(cell) if remembering else None, torch.get_rng_state()
        z = self._state(cell, cell.prepare(x, memory))

        def f(z: Tensor, x: Tensor) -> Tensor:
            torch.set_rng_state(random)  # the same masks
            return cell(z, cell.prepare(x, memory))

        before = f(z, x)
        for t in range(self.time):
            later_x, later_z = x.clone(), z.clone()
            later_x[:, t:] += 1
            later_z[:, t:] -= 1 + torch.rand(later_z[:, t:].shape, generator=torch.Generator().manual_seed(t)).to(z)
            after = f(later_z, later_x)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.allclose(after[:, t], before[:, t])

    def test_chosen_samples_with_a_cache(self) -> None:
        """A cache is a batch-first tree, whose streams may begin at different positions."""
        if not self.padded_cache:
            pytest.skip("the cell has no cache of its own")
        cell: Any = self._cell()
        (x,) = self.inputs(4)
        with torch.no_grad():
            prepared = cell.prepare(x, cell.cache(4, padding=torch.tensor([2, 0, 3, 1])))
            self._check_rows(cell, prepared, self._state(cell, prepared))

    def test_streams_with_a_memory_are_independent(self) -> None:
        """A stream has the f and the next memory that it has without the other streams and their memories."""
        cell: Any = self._cell()
        (x,) = self.inputs(3)
        memory, index = self._past(cell, 3), torch.tensor([2])
        prepared, single = cell.prepare(x, memory), cell.prepare(x[index], take_rows(memory, index))
        z = self._state(cell, prepared)
        assert_close(cell(z[index], single), cell(z, prepared)[index], rtol=0, atol=1e-13)
        alone, together = cell.remember(z[index], single), cell.remember(z, prepared)
        for a, b in zip(tensors_in(alone), tensors_in(take_rows(together, index)), strict=True):
            assert_close(a, b, rtol=0, atol=1e-13)

    def test_a_cache_with_padding_ignores_it(self) -> None:
        """A stream has the f that it has without the positions before its text, also in the positions that follow."""
        if not self.padded_cache:
            pytest.skip("the cell has no cache of its own")
        cell: Any = self._cell()
        padding, (x,), (later,) = [2, 0, 3], self.inputs(3), self.inputs(3, 1)
        with torch.no_grad():
            prepared = cell.prepare(x, cell.cache(3, padding=torch.tensor(padding)))
            padded = torch.arange(self.time) < torch.tensor(padding)[:, None]
            z = self._state(cell, prepared).masked_fill(padded[..., None], 0)  # as every iterate is, from a start 0
            together = cell(z, prepared)
            prepared = cell.prepare(later, cell.remember(z, prepared))
            next_z = self._state(cell, prepared)
            following = cell(next_z, prepared)
            for row, before in enumerate(padding):
                one, text = slice(row, row + 1), slice(before, None)
                single = cell.prepare(x[one, text], cell.cache(1))
                assert_close(cell(z[one, text], single), together[one, text], rtol=0, atol=1e-12)
                single = cell.prepare(later[one], cell.remember(z[one, text], single))
                assert_close(cell(next_z[one], single), following[one], rtol=0, atol=1e-12)

    def test_a_part_of_a_batch_draws_the_numbers_of_the_whole(self) -> None:
        """In training, f of some rows with their ``BatchSlice`` equals those rows of f of the whole batch."""
        cell: Any = self._cell(training=True)
        (x,) = self.inputs(3)
        memory, random = self._past(cell, 3), torch.get_rng_state()
        prepared = cell.prepare(x, memory)
        z = self._state(cell, prepared)
        whole = cell(z, prepared)
        for rows in (slice(0, 1), slice(1, 3)):
            index = torch.arange(3)[rows]
            torch.set_rng_state(random)
            part = cell.prepare(x[rows], take_rows(memory, index), part=BatchSlice(rows.start, 3))
            assert_close(cell(z[rows], part), whole[rows], rtol=0, atol=1e-12)

    def test_padding_after_a_remembered_text_changes_nothing(self) -> None:
        """A row whose text continues a memory and then ends has the f that it has alone."""
        if not self.padding:
            pytest.skip("the cell has no padding")
        cell: Any = self._cell()
        lengths, (x,), memory = (self.time, 2, 1), self.inputs(3), self._past(cell, 3)
        mask = torch.arange(self.time) >= torch.tensor(lengths)[:, None]
        prepared = cell.prepare(x, memory, key_padding_mask=mask)
        z = self._state(cell, prepared).masked_fill(mask[..., None], 0)
        together = cell(z, prepared)
        assert not together[mask].any()
        for row, n in enumerate(lengths):
            one = slice(row, row + 1)
            single = cell.prepare(x[one, :n], take_rows(memory, torch.tensor([row])))
            assert_close(cell(z[one, :n], single), together[one, :n], rtol=0, atol=1e-13)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_no_state_and_no_gradient(self, side: str) -> None:
        """A padded row has the f and the gradients that it has alone, also in the segment that follows."""
        if not self.padding:
            pytest.skip("the cell has no padding")
        cell: Any = self._cell()
        lengths, (x,), (later,) = (self.time, 2, 3), self.inputs(3), self.inputs(3)
        texts = [slice(self.time - n, None) if side == "left" else slice(0, n) for n in lengths]
        mask = torch.ones(3, self.time, dtype=torch.bool)
        for row, text in enumerate(texts):
            mask[row, text] = False
        prepared, z = cell.prepare(x, key_padding_mask=mask), self._state(cell, cell.prepare(x))
        padded = z.masked_fill(mask[..., None], 0)  # as every iterate is, since f is 0 there
        together = cell(padded, prepared)
        assert not together[mask].any()
        following = cell(z, cell.prepare(later, cell.remember(padded, prepared)))
        wanted = list(cell.parameters())
        gradient = torch.autograd.grad((together.square().sum() + following.square().sum()), wanted, allow_unused=True)
        alone = [torch.zeros_like(parameter) for parameter in wanted]
        for row, text in enumerate(texts):
            one = slice(row, row + 1)
            single = cell.prepare(x[one, text])
            f = cell(z[one, text], single)
            assert_close(f, together[one, text], rtol=0, atol=1e-13)
            after = cell(z[one], cell.prepare(later[one], cell.remember(z[one, text], single)))
            assert_close(after, following[one], rtol=0, atol=1e-13)
            total = f.square().sum() + after.square().sum()
            for known, found in zip(alone, torch.autograd.grad(total, wanted, allow_unused=True), strict=True):
                known.add_(0 if found is None else found)
        for known, found in zip(alone, gradient, strict=True):
            assert_close(torch.zeros_like(known) if found is None else found, known, rtol=1e-9, atol=1e-11)

    def test_memory_is_a_detached_tree_with_the_batch_first(self) -> None:
        """The memory of some streams equals the same rows of the memory of all."""
        cell: Any = self._cell()
        (x,) = self.inputs(3)
        prepared = cell.prepare(x)
        z = self._state(cell, prepared)
        memory, index = cell.remember(z.requires_grad_(), prepared), torch.tensor([2, 0])
        assert not any(leaf.requires_grad for leaf in tensors_in(memory))
        some = cell.remember(z[index], cell.prepare(x[index]))
        for a, b in zip(tensors_in(take_rows(memory, index)), tensors_in(some), strict=True):
            assert_close(a, b.detach(), rtol=0, atol=1e-13)

    def test_the_memory_of_a_layer_is_its_own(self) -> None:
        """The memory does not change when a caller changes the input or the output in place."""
        cell: Any = self._cell()
        for layer in (Equilibrium(cell, stop=Stop(rtol=0, max_evals=2)), Unrolled(cell, 2), Stack([cell, cell])):
            (x,) = self.inputs(BATCH)
            with torch.no_grad():
                out = layer(x)
            known = [leaf.clone() for leaf in tensors_in(out.memory)]
            for leaf in (x, *tensors_in(out.z), *tensors_in(out.output)):
                leaf.add_(1)
            assert all(map(torch.equal, tensors_in(out.memory), known))

    def test_warm_starts_are_states_and_change_nothing_but_the_cost(self) -> None:
        """Both starts lead to the same equilibrium."""
        cell: Any = self._cell()
        (x,) = self.inputs(BATCH)
        for memory in (None, self._past(cell)):
            cold, warm = (cell.start(cell.prepare(x, memory, warm=warm)) for warm in (False, True))
            assert warm.shape == cold.shape
            assert warm.dtype == cold.dtype
        contraction: Any = self.make_contraction()
        if contraction is None:
            return
        layer, memory = Equilibrium(contraction.eval()), self._past(contraction)
        method = Method(Anderson(), Stop(rtol=1e-10, atol=0, max_evals=200))
        found = [layer(x, memory, method=method, warm=warm) for warm in (False, True)]
        assert all(out.solution.converged.all() for out in found)
        assert_close(found[0].z, found[1].z, rtol=1e-6, atol=1e-7)

    def test_segment_law_of_the_map(self) -> None:
        """f of several segments at once equals f of each, with the memory of those before it."""
        if not (self.segment_law and self.segment_law_of_the_map):
            pytest.skip("the law holds for the equilibrium alone, or not at all")
        cell: Any = self._cell()
        for lengths in ((self.time, self.time), (1, self.time - 1, 1)):
            (x,) = self.inputs(BATCH, sum(lengths))
            prepared, memory, pieces = cell.prepare(x), None, []
            z = self._state(cell, prepared)
            for piece_x, piece_z in zip(x.split(lengths, dim=1), z.split(lengths, dim=1), strict=True):
                piece = cell.prepare(piece_x, memory)
                pieces.append(cell(piece_z, piece))
                memory = cell.remember(piece_z, piece)
            assert_close(torch.cat(pieces, dim=1), cell(z, prepared), rtol=0, atol=1e-12)

    def test_segment_law_of_the_equilibrium(self) -> None:
        """Solving in pieces of 1, 2 and 1 positions, with memory or a cache, gives the equilibrium of the whole."""
        contraction = self.make_contraction()
        if contraction is None or not self.segment_law:
            pytest.skip("the suite knows no contraction of this cell, or its segments are no law")
        layer = Equilibrium(contraction.eval(), Anderson(), Stop(rtol=1e-13, atol=1e-13, max_evals=100))
        (x,) = self.inputs(BATCH, 4)
        with torch.no_grad():
            joint = layer(x)
            assert joint.solution is not None
            assert joint.solution.converged.all()
            for memory in (None, contraction.cache(BATCH)):
                pieces = []
                for piece in x.split([1, 2, 1], dim=1):
                    out = layer(piece, memory)
                    memory = out.memory
                    pieces.append(out.z)
                assert_close(torch.cat(pieces, dim=1), joint.z, rtol=0, atol=1e-10)
