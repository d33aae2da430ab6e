"""How PyTorch's tracers treat a solve: torch.compile runs it between two graphs, and torch.export refuses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from equilibria.torch_private import outside_of_graphs

_P = ParamSpec("_P")
_T = TypeVar("_T")

_INSTEAD = "unroll the equilibrium to a fixed depth, Unrolled(layer.cell, depth=30), which has the same parameters"


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, which ``torch.compile`` calls between its graphs and never traces.

    It is for all that solves, differentiates or is called in a backward pass. Cells are traced where no solve is around
    them, and a cell that was compiled by itself runs compiled inside a solve.
    """
    return outside_of_graphs(
        function,
        "the number of evaluations of f depends on the data, so a solve runs between compiled graphs: leave out "
        f"fullgraph=True, or {_INSTEAD}",
    )


def check_not_exported() -> None:
    """Raise a RuntimeError inside torch.export and torch.jit.trace, which would record the steps of one batch."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise RuntimeError(
            "A solve cannot be exported or traced, since its number of evaluations of f depends on the data; "
            f"{_INSTEAD}, and export that."
        )
