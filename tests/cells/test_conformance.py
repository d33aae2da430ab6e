"""Every configuration of the catalogue of cells keeps the laws of its suite."""

from __future__ import annotations

import torch

from equilibria.cells import CELLS, AffineConfig, ChainConfig, TransformerCell, TransformerConfig, TrellisConfig
from equilibria.testing import CellSuite, SequenceCellSuite


class Affine(CellSuite):
    config: AffineConfig

    def make(self):
        return self.config.build().double()

    def inputs(self, batch):
        return (torch.randn(batch, 4, self.config.width, dtype=torch.float64),)


class Transformer(SequenceCellSuite):
    config: TransformerConfig

    def make(self):
        cell = self.config.build().double()
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                if not name.endswith("gain"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return cell

    def make_contraction(self):
        if self.config.norm == "pre":
            return None  # the residual of the textbook's pre-norm grows without bound
        return contraction(self.config)

    def inputs(self, batch, time=None):
        return (torch.randn(batch, time or self.time, self.config.width, dtype=torch.float64),)


class Chain(Transformer):
    def make(self):
        return self.config.build().double()

    def make_contraction(self):
        return contraction(self.config)


class Trellis(Transformer):
    def make(self):
        cell = self.config.build().double()
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                parameter.add_(torch.rand_like(parameter) if name.endswith("gain") else torch.randn_like(parameter))
        return cell

    def make_contraction(self):
        return self.config.build().double()


def contraction(config):
    """A strong input makes a fresh transformer a contraction."""
    cell = config.build().double()
    with torch.no_grad():
        for module in cell.modules():
            if isinstance(module, TransformerCell):
                if module.inject is not None:
                    module.inject.direction.mul_(300)
                if module.attention.norm is not None:
                    module.attention.out.gain.mul_(100)
    return cell


SUITES = {AffineConfig: Affine, TransformerConfig: Transformer, ChainConfig: Chain, TrellisConfig: Trellis}

for number, config in enumerate(CELLS):
    scanning = isinstance(config, TrellisConfig) and config.recurrence == "scan"
    divided = isinstance(config, ChainConfig) and config.memory == "last"
    fields = {"config": config, "segment_law_of_the_map": not scanning, "segment_law": not divided}
    name = f"Test{type(config).__name__}{number}"
    globals()[name] = type(name, (SUITES[type(config)],), fields)
