"""deq-lm of TorchDEQ: several blocks, applied in turn, with one memory for all."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

from torch import Tensor

from equilibria.cells.chain import ChainConfig
from equilibria.lm.convert.deq_transformer import block, check_frequencies, sizes
from equilibria.lm.convert.format import Format, Row, check_cell, filled, linear
from equilibria.lm.convert.softmax import clustered, vocabulary_size, with_clusters
from equilibria.lm.convert.tensors import ConversionError, Tensors
from equilibria.lm.model import LanguageConfig

NORMS = tuple(
    Row(f"{ours}.{part}", f"{theirs}.{part}")
    for ours, theirs in (
        ("norms.0", "pos_ff.{}.ln"),
        ("norms.1", "dec_attn.{}.ln1"),
        ("attention.norm", "dec_attn.{}.ln2"),
    )
    for part in ("weight", "bias")
)
"""Before the feed-forward network, before the attention, and before its output matrix."""


class DEQLanguageModel(Format):
    """Blocks with layer norms that have gains and biases, and with one more before the output of the attention."""

    name: ClassVar[str] = "TorchDEQ's deq-lm"
    copies: ClassVar[tuple[str, ...]] = ("deq.",)

    def matches(self, tensors: Tensors) -> bool:
        """True with a list of blocks below ``func.dec_attn``."""
        return "func.dec_attn.0.r_w_bias" in tensors

    def vocabulary_size(self, tensors: Tensors) -> int:
        """V."""
        return vocabulary_size(tensors)

    def model(self, tensors: Tensors, config: LanguageConfig) -> LanguageConfig:
        """Number and sizes of the blocks, the places of their norms, the kind of memory, and the clusters."""
        check_cell(self, config, ChainConfig, recipes="wikitext103-unrolled")
        assert isinstance(config.cell, ChainConfig)
        first, blocks = config.cell.cells[0], []
        for index in range(tensors.count("func.dec_attn.{}.r_w_bias")):
            names = (f"func.dec_attn.{index}.", f"func.pos_ff.{index}.")
            known = sizes(tensors, *names, injection="injection.weight")
            known |= {"norm": "pre", "affine": True, "attention_norm": True}
            blocks.append(dataclasses.replace(first, **known))
        if len({one.heads for one in blocks}) > 1:
            raise ConversionError(f"{tensors.source}: its blocks differ in their heads, and they share one injection.")
        cell = dataclasses.replace(config.cell, cells=tuple(blocks), memory="last")
        return with_clusters(tensors, dataclasses.replace(config, cell=cell, mixture=None))

    def weights(self, tensors: Tensors, config: LanguageConfig) -> dict[str, Tensor]:
        """The blocks, the injection of the first, embedding and head."""
        assert isinstance(config.cell, ChainConfig)
        check_frequencies(tensors, config.cell.width)
        found, change = {}, partial(_heads_last, heads=config.cell.cells[0].heads)
        for index in range(len(config.cell.cells)):
            under, names = f"layer.cell.blocks.{index}.", (f"func.dec_attn.{index}.", f"func.pos_ff.{index}.")
            found |= block(tensors, *names, under=under, change=change)
            rows = (dataclasses.replace(row, theirs=row.theirs.format(index)) for row in NORMS)
            found |= filled(tensors, rows, below="func.", under=under)
        found |= linear(tensors, "injection.", "layer.cell.blocks.0.inject", change=change)
        return found | clustered(tensors, config)


def _heads_last(rows: Tensor, *, heads: int) -> Tensor:
    """Rows in the order [3, H, C]: theirs are [H, 3, C], the query, key and value of a head side by side.

    Raises:
        ConversionError: they cannot be divided so.
    """
    if rows.ndim == 0 or len(rows) % (3 * heads):
        raise ConversionError(
            f"A tensor of queries, keys and values, or of their injection, has the shape {tuple(rows.shape)}, and its "
            f"rows are those of {heads} heads, three times; it was saved by a changed code."
        )
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
