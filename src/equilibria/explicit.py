"""Unrolled, Stack: the explicit networks of the same cells.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint as recomputed

from equilibria.layer import Cell, Context, LayerOutput, Memory
from equilibria.stop import check_kind


class Unrolled(nn.Module):
    """The explicit, weight-tied network of depth L: z_l = f(z_{l−1}; x), z_0 = start, with back-propagation.

    All layers read one memory, that of the last state, so that for L → ∞ it is the equilibrium. Two segments joined by
    it are therefore not quite one long one, as they are for ``Stack``.

    Args:
        cell: the map f.
        depth: L, evaluations of f.
        checkpoint: keep only the states and evaluate f again in the backward pass (T. Chen et al. 2016).
        auxiliary_every: in training, give the outputs of layers k, 2k, … ≤ L too, for auxiliary losses; 0 for none.
    """

    def __init__(self, cell: Cell, depth: int, *, checkpoint: bool = False, auxiliary_every: int = 0) -> None:
        super().__init__()
        check_kind("cell", cell, Cell, "TransformerCell(TransformerShape()), or a Cell of your own")
        if depth < 1:
            raise ValueError(f"Unrolled(depth={depth}): a network has at least one layer; try depth=12.")
        if not 0 <= auxiliary_every <= depth:
            raise ValueError(
                f"Unrolled(depth={depth}, auxiliary_every={auxiliary_every}): one of the {depth} layers at least has "
                "an auxiliary output, or none with 0; try a fifth of the depth."
            )
        self.cell, self.depth, self.checkpoint, self.auxiliary_every = cell, depth, checkpoint, auxiliary_every

    def forward(self, x: Float[Tensor, "B T D"], memory: Memory = None) -> LayerOutput:
        """The last state under input ``x [B T D]`` and the memory of the previous segment."""
        context = self.cell.prepare(x, memory)
        z, auxiliary = self.cell.start(context), []
        for layer in range(1, self.depth + 1):
            z = _layer(self.cell, z, context, checkpoint=self.checkpoint)
            if self.training and self.auxiliary_every and layer % self.auxiliary_every == 0:
                auxiliary.append(self.cell.output(z))
        return LayerOutput(
            z=z,
            memory=self.cell.remember(z, context),
            f=lambda z: self.cell(z, context),
            solution=None,
            output=self.cell.output(z),
            auxiliary=tuple(auxiliary),
        )

    def cache(self, batch: int, **choices: Any) -> Memory:
        """A memory for generation; see ``Cell.cache``."""
        choices["warm"] = False  # a network of fixed depth begins where it was trained to begin
        return self.cell.cache(batch, **choices)

    def extra_repr(self) -> str:
        """Depth."""
        return f"depth={self.depth}, checkpoint={self.checkpoint}, auxiliary_every={self.auxiliary_every}"


class Stack(nn.Module):
    """The explicit network of L cells, each applied once, each with a memory of its own: z_l = f_l(z_{l−1}; x).

    A layer remembers its input z_{l−1}, whose keys and values are those it sees (Dai et al. 2019, eq. 3), so that two
    segments joined by memory are one long one. x enters every cell through its ``prepare``, and z_0 is the start of the
    first. A cell may occur several times: then its layers share their weights, and draw dropout masks of their own. A
    cell whose f carries on what it computed itself, such as a TrellisCell with "scan", would need more than its input.

    Args:
        cells: f_1, …, f_L.
        checkpoint: keep only the states and evaluate each layer again in the backward pass (T. Chen et al. 2016).
    """

    def __init__(self, cells: Iterable[Cell], *, checkpoint: bool = False) -> None:
        super().__init__()
        self.cells, self.checkpoint = nn.ModuleList(cells), checkpoint
        if not self.cells:
            raise ValueError("Stack(cells=[]): a stack has at least one cell; give one cell a layer.")

    @property
    def _cells(self) -> list[Cell]:
        return list(self.cells)  # pyright: ignore

    def forward(self, x: Float[Tensor, "B T D"], memory: tuple[Memory, ...] | None = None) -> LayerOutput:
        """The last layer's state under input ``x [B T D]``; the memory is a tuple, one entry a layer."""
        memories = (None,) * len(self.cells) if memory is None else memory
        contexts = [cell.prepare(x, past) for cell, past in zip(self._cells, memories, strict=True)]
        z = self._cells[0].start(contexts[0])
        kept: list[Memory] = []
        for cell, context in zip(self._cells, contexts, strict=True):
            kept.append(cell.remember(z, context))
            z = _layer(cell, z, context, checkpoint=self.checkpoint)
        return LayerOutput(
            z=z,
            memory=tuple(kept),
            f=lambda z: self.cells[-1](z, contexts[-1]),
            solution=None,
            output=self._cells[-1].output(z),
        )

    def cache(self, batch: int, *, memory: tuple[Memory, ...] | None = None, **choices: Any) -> tuple[Memory, ...]:
        """A memory for generation, one entry a layer; see ``Cell.cache``."""
        memories = (None,) * len(self.cells) if memory is None else memory
        choices["warm"] = False
        pairs = zip(self._cells, memories, strict=True)
        return tuple(cell.cache(batch, memory=past, **choices) for cell, past in pairs)


def _layer(cell: Cell, z: Tensor, context: Context, *, checkpoint: bool) -> Tensor:
    if not checkpoint or not is_grad_enabled():
        return cell(z, context)
    # f draws no random numbers, so there is no state of a generator to bring back.
    return recomputed(cell, z, context, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
