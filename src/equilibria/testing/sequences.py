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
from equilibria.layers.cell import Prepared
from equilibria.layers.equilibrium import Equilibrium
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

    def _prepared(self, cell: Any, inputs: tuple[Any, ...]) -> Prepared:
        (x,) = inputs
        return cell.prepare(x, self._past(cell, len(x), dtype=x.dtype))

    @pytest.mark.parametrize("remembering", [False, True])
    def test_causal(self, remembering: bool) -> None:
        """Later positions do not affect earlier ones."""
        cell: Any = self._cell()
        (x,) = self.inputs(BATCH)
        memory = self._past(cell) if remembering else None
        z = self._state(cell, cell.prepare(x, memory))
        before = cell(z, cell.prepare(x, memory))
        for t in range(self.time):
            later_x, later_z = x.clone(), z.clone()
            later_x[:, t:] += 1
            later_z[:, t:] -= torch.randn_like(later_z[:, t:])
            after = cell(later_z, cell.prepare(later_x, memory))
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
        """f of two segments at once equals f of the first, then f of the second with the memory of the first."""
        if not (self.segment_law and self.segment_law_of_the_map):
            pytest.skip("the law holds for the equilibrium alone, or not at all")
        cell: Any = self._cell()
        (x,) = self.inputs(BATCH, 2 * self.time)
        half, prepared = self.time, cell.prepare(x)
        z = self._state(cell, prepared)
        joint, beginning = cell(z, prepared), cell.prepare(x[:, :half])
        first = cell(z[:, :half], beginning)
        second = cell(z[:, half:], cell.prepare(x[:, half:], cell.remember(z[:, :half], beginning)))
        assert_close(torch.cat([first, second], dim=1), joint, rtol=0, atol=1e-12)

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
