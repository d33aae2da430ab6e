"""compile_cells: torch.compile for the cells of a model."""

from __future__ import annotations

import torch.compiler.config as compiler
from torch import nn

from equilibria.layers.cell import Cell


def compile_cells(model: nn.Module) -> None:
    """Compile every cell in place, so that parameters keep their names.

    The recompile limit is raised, because a cell is compiled for many combinations: with and without memory, with and
    without graph and dropout, for all samples of the batch and for some.
    """
    compiler.recompile_limit = max(compiler.recompile_limit, 64)
    for module in model.modules():
        if isinstance(module, Cell):
            module.compile()
