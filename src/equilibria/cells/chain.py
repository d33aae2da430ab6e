"""Several blocks in a row as one cell: f = f_L ∘ … ∘ f_1, all under one injection of the input.

Letters: B batch, T time, D width, L blocks.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equilibria.cells.transformer import TransformerCell
from equilibria.cells.transformer_context import TransformerCache, TransformerContext, TransformerMemory
from equilibria.cells.transformer_shape import TransformerShape
from equilibria.equilibrium import Cell

_Memory = tuple[TransformerMemory | TransformerCache | None, ...]


@dataclasses.dataclass(frozen=True)
class ChainShape:
    """The hyper-parameters of a ``ChainCell``."""

    cells: tuple[TransformerShape, ...] = (TransformerShape(), TransformerShape())
    """The blocks, in the order in which they are applied; widths and memories are the same."""

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError("ChainShape(cells=()): a chain has at least one block; give one TransformerShape(…).")
        for name in ("width", "memory"):
            values = {getattr(cell, name) for cell in self.cells}
            if len(values) > 1:
                raise ValueError(
                    f"ChainShape: the blocks differ in their {name} ({', '.join(map(str, sorted(values)))}), and each "
                    f"goes on from the one before; give all the same {name}."
                )

    @property
    def width(self) -> int:
        """D, channels of the state."""
        return self.cells[0].width

    @property
    def outputs(self) -> int:
        """D, channels of what the layers after read: the whole state."""
        return self.width

    @property
    def memory(self) -> int:
        """M, positions that are remembered."""
        return self.cells[0].memory

    def build(self) -> ChainCell:
        """The cell, with fresh parameters."""
        return ChainCell(self)


@dataclasses.dataclass(frozen=True, eq=False)
class ChainContext:
    """What is constant during a solve: that of each block."""

    blocks: tuple[TransformerContext, ...]


class ChainCell(Cell):
    """z ↦ f_L(… f_1(z; x) …; x): blocks with weights of their own, and the injection of the first for all of them.

    The cell of the language model of TorchDEQ (Geng and Kolter 2023) is such a chain of three.
    1. There every block reads the memory of the final state. Here each remembers its own input, so that two segments
       joined by memory have the equilibrium of one.
    """

    def __init__(self, shape: ChainShape) -> None:
        super().__init__()
        self.shape = shape
        first, *others = shape.cells
        bare = (dataclasses.replace(other, injection=False) for other in others)
        self.blocks = nn.ModuleList(cell.build() for cell in (first, *bare))

    @property
    def _cells(self) -> list[TransformerCell]:
        return list(self.blocks)  # pyright: ignore

    def prepare(self, x: Float[Tensor, "B T D"], memory: _Memory | None) -> ChainContext:
        """What each block prepares, the input injected once."""
        injection = self._cells[0].injected(x)
        memories = (None,) * len(self.blocks) if memory is None else memory
        pairs = zip(self._cells, memories, strict=True)
        return ChainContext(blocks=tuple(cell.prepare_injected(x, injection, past) for cell, past in pairs))

    def start(self, context: ChainContext) -> Float[Tensor, "B T D"]:
        """That of the first block."""
        return self._cells[0].start(context.blocks[0])

    def warm_start(self, context: ChainContext) -> Float[Tensor, "B T D"]:
        """That of the first block, which remembers its input: the last state."""
        return self._cells[0].warm_start(context.blocks[0])

    def forward(self, z: Float[Tensor, "B T D"], context: ChainContext) -> Float[Tensor, "B T D"]:
        """f(z)."""
        for cell, block in zip(self._cells, context.blocks, strict=True):
            z = cell(z, block)
        return z

    def select(self, context: ChainContext, rows: Int[Tensor, " R"]) -> ChainContext:
        """Each block's context of these samples."""
        pairs = zip(self._cells, context.blocks, strict=True)
        return ChainContext(blocks=tuple(cell.select(block, rows) for cell, block in pairs))

    def remember(self, z: Float[Tensor, "B T D"], context: ChainContext) -> _Memory:
        """What each block remembers of its own input, which takes one more evaluation of all blocks but the last."""
        kept = []
        with torch.no_grad():
            for cell, block in zip(self._cells, context.blocks, strict=True):
                kept.append(cell.remember(z, block))
                z = cell(z, block) if len(kept) < len(self.blocks) else z
        return tuple(kept)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: tuple[TransformerMemory | None, ...] | None = None,
        warm: bool = False,
    ) -> tuple[TransformerCache, ...]:
        """One cache a block, for generation; see ``TransformerCell.cache``."""
        memories = (None,) * len(self.blocks) if memory is None else memory
        return tuple(
            cell.cache(batch, length=length, padding=padding, memory=past, warm=warm)
            for cell, past in zip(self._cells, memories, strict=True)
        )
