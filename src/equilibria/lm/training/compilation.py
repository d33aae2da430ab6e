"""compile_cells: torch.compile for the cells of a model."""

from __future__ import annotations

from torch import nn

from equilibria.layers.cell import Cell


def compile_cells(model: nn.Module) -> None:
    """Compiles every cell, in place: parameters keep their names.

    A cell is called in more ways than torch.compile expects of one function before it gives up: with and without past,
    graph and dropout, with all rows and with some.
    """
    import torch._dynamo  # which takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.modules():
        if isinstance(module, Cell):
            module.compile()
