"""How torch.compile treats a solve: it runs between two graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from equilibria.torch_private import outside_of_graphs

_P = ParamSpec("_P")
_T = TypeVar("_T")

INSTEAD = "unroll the equilibrium to a fixed depth, Unrolled(layer.cell, depth=30), which has the same parameters"
"""The advice to those who need one graph."""


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, which ``torch.compile`` calls between its graphs and never traces.

    It is for all that solves, differentiates or is called in a backward pass. Cells are traced where no solve is around
    them, and a cell that was compiled by itself runs compiled inside a solve.
    """
    return outside_of_graphs(
        function,
        "the number of evaluations of f depends on the data, so a solve runs between compiled graphs: leave out "
        f"fullgraph=True, or {INSTEAD}",
    )
