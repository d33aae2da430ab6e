"""TrellisNet of locuslab/trellisnet: an explicit network, whose words are numbered by first appearance."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.lm.convert.deq_trellisnet import both_times, with_sizes, words
from equilibria.lm.convert.format import Format, check_cell, is_normed, linear
from equilibria.lm.convert.numbering import Numbering
from equilibria.lm.convert.tensors import Tensors
from equilibria.lm.corpora import Source
from equilibria.lm.model import LanguageConfig

BELOW = "network.0.module.full_conv."


class TrellisNet(Format):
    """One module with the weights of the input, ``weight1``, and of the state, ``weight2``, and one bias."""

    name: ClassVar[str] = "TrellisNet of locuslab/trellisnet"
    copies: ClassVar[tuple[str, ...]] = ("network.0.module.net.", "network.1.", "mixsoft.decoder.")

    def matches(self, tensors: Tensors) -> bool:
        """True with a ``bias2``."""
        return f"{BELOW}bias2" in tensors

    def vocabulary_size(self, tensors: Tensors) -> int:
        """V."""
        return len(tensors.look("encoder.weight", axes=(2,)))

    def model(self, tensors: Tensors, config: LanguageConfig) -> LanguageConfig:
        """Widths, weight norm and mixture; the number of layers is in no file."""
        check_cell(self, config, TrellisConfig, recipes="ptb-trellis-deep or wikitext103-trellis-deep", explicit=True)
        channels = len(tensors.look(f"{BELOW}bias2", axes=(1,))) // 4
        normed = is_normed(tensors, BELOW, weight="weight2")
        sized = with_sizes(tensors, config, channels=channels, normed=normed)
        return dataclasses.replace(sized, cell=dataclasses.replace(sized.cell, recurrence="delayed"))

    def weights(self, tensors: Tensors, config: LanguageConfig) -> dict[str, Tensor]:
        """Both matrices, the bias, embedding and head."""
        found = linear(tensors, BELOW, "layer.cell.state", bias=False, weight="weight2", change=both_times)
        found |= linear(tensors, BELOW, "layer.cell.input", bias=False, weight="weight1", change=both_times)
        found["layer.cell.state.bias"] = tensors.take(f"{BELOW}bias2")
        return found | words(tensors, config)

    def numbering(self, source: Source) -> Numbering:
        """By first appearance."""
        return "appearance"
