"""Several blocks in a row as one cell: f = f_L ∘ … ∘ f_1, all under one injection of the input.

Each block remembers its own input, or all read one memory of the final state.

Letters: B batch, T time, D width, L blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equilibria.cells.transformer.cell import TransformerCell, TransformerConfig
from equilibria.cells.transformer.past import TransformerCache, TransformerMemory, TransformerPast
from equilibria.checks import check_fields
from equilibria.layers.cell import Prepared
from equilibria.layers.dropout import BatchSlice
from equilibria.layers.sequence import SequenceCell

_Memory = TransformerMemory | tuple[TransformerPast | None, ...]
"""With memory "blocks" a tuple with one past per block; with "last" one memory for all, or a tuple of caches."""


@dataclasses.dataclass(frozen=True)
class ChainConfig:
    """The hyper-parameters of a ``ChainCell``."""

    cells: tuple[TransformerConfig, ...] = (TransformerConfig(), TransformerConfig())
    """The blocks, in the order in which they are applied; widths and memories are the same."""
    memory: Literal["blocks", "last"] = "blocks"
    """The states that a block reads of the past: its own inputs ("blocks"), so that two segments joined by memory are
    one long segment; or, as all others, the final states of the chain ("last"), as in TorchDEQ's language model. With
    "last" the division into segments is a part of the model, and a token generated on its own is a segment."""

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError("ChainConfig(cells=()): a chain has at least one block; give one TransformerConfig(…).")
        check_fields(self)
        if not isinstance(self.cells, tuple) or not all(isinstance(cell, TransformerConfig) for cell in self.cells):
            raise ValueError(f"ChainConfig(cells={self.cells!r}): these are a tuple of TransformerConfig(…).")
        for name in ("width", "memory"):
            values = {getattr(cell, name) for cell in self.cells}
            if len(values) > 1:
                raise ValueError(
                    f"ChainConfig: the blocks differ in their {name} ({', '.join(map(str, sorted(values)))}), and each "
                    f"continues from the one before; give all the same {name}."
                )

    @property
    def width(self) -> int:
        """D, channels of the state."""
        return self.cells[0].width

    @property
    def outputs(self) -> int:
        """D, the number of channels that later layers read: the whole state."""
        return self.width

    def build(self) -> ChainCell:
        """The cell, with fresh parameters."""
        return ChainCell(self)


class ChainCell(SequenceCell):
    """z ↦ f_L(… f_1(z; x) …; x): blocks with separate weights that share the injection of the first block.

    The language model of TorchDEQ (Geng and Kolter 2023) has such a cell, a chain of three with ``memory="last"``. With
    "blocks" each block remembers its own input, so that two segments joined by memory have the equilibrium of one; with
    "last" they have not, since positions of the same segment read the inputs of blocks, and later ones final states.
    """

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.config = config
        first, *others = config.cells
        bare = (dataclasses.replace(other, injection=False) for other in others)
        self.blocks = nn.ModuleList(cell.build() for cell in (first, *bare))

    @property
    def _cells(self) -> list[TransformerCell]:
        return list(self.blocks)  # pyright: ignore

    def prepare(
        self,
        x: Float[Tensor, "B T D"],
        memory: _Memory | None = None,
        *,
        warm: bool = False,
        part: BatchSlice | None = None,
        key_padding_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Prepared:
        """The prepared values of each block, in tuples; the input is injected once."""
        injection = self._cells[0].injected(x)
        memories = self._memories(memory)
        blocks = [
            cell.prepare(x, past, warm=warm, part=part, key_padding_mask=key_padding_mask, injection=injection)
            for cell, past in zip(self._cells, memories, strict=True)
        ]
        shared, rows, kept = zip(*((block.shared, block.rows, block.kept) for block in blocks), strict=True)
        return Prepared(shared=shared, rows=rows, kept=kept, droppable=blocks[0].droppable)

    def _memories(self, memory: _Memory | None) -> tuple[TransformerPast | None, ...]:
        """The past of each block; a ValueError if a chain with the other kind of memory has left it."""
        if memory is None:
            return (None,) * len(self.blocks)
        if isinstance(memory, TransformerMemory):
            if self.config.memory == "last":
                return (memory,) * len(self.blocks)
            found = "one memory for all blocks"
        elif self.config.memory == "blocks" or not any(isinstance(past, TransformerMemory) for past in memory):
            return memory
        else:
            found = "one memory per block"
        raise ValueError(
            f"the past is {found}, and this chain has memory={self.config.memory!r}; give the memory that this chain "
            "has returned, or None where the text begins."
        )

    def start(self, prepared: Prepared) -> Float[Tensor, "B T D"]:
        """The start of the first block; if warm the last state of the chain, which is that block's remembered input."""
        return self._cells[0].start(Prepared(kept=prepared.kept[0]))

    def forward(self, z: Float[Tensor, "B T D"], prepared: Prepared) -> Float[Tensor, "B T D"]:
        """f(z)."""
        for cell, shared, rows in zip(self._cells, prepared.shared, prepared.rows, strict=True):
            z = cell(z, Prepared(shared=shared, rows=rows))
        return z

    def remember(self, z: Float[Tensor, "B T D"], prepared: Prepared) -> _Memory | None:
        """The memory of each block, made from its own input: all blocks but the last are evaluated once more.

        With ``memory="last"`` one memory of z for all blocks, or where they continue from caches, these with z.
        """
        past = prepared.kept[0].memory
        if self.config.memory == "last" and (past is None or isinstance(past, TransformerMemory)):
            found = self._cells[0].remember(z, Prepared(kept=prepared.kept[0]))
            return cast("TransformerMemory | None", found)  # a cache would come only from a cache
        parts = zip(prepared.shared, prepared.rows, prepared.kept, strict=True)
        blocks = [Prepared(shared=shared, rows=rows, kept=kept) for shared, rows, kept in parts]
        if self.config.memory == "last":
            return tuple(cell.remember(z, block) for cell, block in zip(self._cells, blocks, strict=True))
        remembered = []
        with torch.no_grad():
            for cell, block in zip(self._cells, blocks, strict=True):
                remembered.append(cell.remember(z, block))
                z = cell(z, block) if len(remembered) < len(self.blocks) else z
        return tuple(remembered)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: _Memory | None = None,
        warm: bool = False,
    ) -> tuple[TransformerCache, ...]:
        """One cache per block, for generation; see ``TransformerCell.cache``."""
        memories = self._memories(memory)
        return tuple(
            cell.cache(batch, length=length, padding=padding, memory=past, warm=warm)  # pyright: ignore (it checks)
            for cell, past in zip(self._cells, memories, strict=True)
        )
