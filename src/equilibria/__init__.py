"""Fixed points in PyTorch: a map, a solver, a stopping rule and a gradient rule.

The public vocabulary. The language models that are built on it live in ``equilibria.lm``; ``load`` reads one back from
a run directory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from equilibria import cells, stability
from equilibria.core.evaluator import Evaluator
from equilibria.core.failure import ConvergenceError, ConvergenceWarning
from equilibria.core.gradient import GradientRule
from equilibria.core.maps import AffineMap, Linearised, Map
from equilibria.core.solve import Solution, solve
from equilibria.core.solver import ForwardSolve, Iterate, Solver
from equilibria.core.state import Layout, State
from equilibria.core.stop import Status, Stop
from equilibria.core.trees import take_rows
from equilibria.errors import EquilibriaError
from equilibria.fixed_point import Method, fixed_point, implicit
from equilibria.gradients import Implicit, Neumann, Phantom, ReversibleGradient, Shine, Unroll
from equilibria.layers.cell import Cell, Prepared
from equilibria.layers.equilibrium import Equilibrium, Layer, LayerOutput
from equilibria.layers.explicit import Stack, Unrolled
from equilibria.layers.sequence import SequenceCell
from equilibria.peak_memory import PeakMemory
from equilibria.solvers import Anderson, Broyden, NewtonKrylov, Picard, Reversible
from equilibria.version import version as _version

if TYPE_CHECKING:
    from equilibria.lm.runs.trained import load

__all__ = [
    "AffineMap",
    "Anderson",
    "Broyden",
    "Cell",
    "ConvergenceError",
    "ConvergenceWarning",
    "EquilibriaError",
    "Equilibrium",
    "Evaluator",
    "ForwardSolve",
    "GradientRule",
    "Implicit",
    "Iterate",
    "Layer",
    "LayerOutput",
    "Layout",
    "Linearised",
    "Map",
    "Method",
    "Neumann",
    "NewtonKrylov",
    "PeakMemory",
    "Phantom",
    "Picard",
    "Prepared",
    "Reversible",
    "ReversibleGradient",
    "SequenceCell",
    "Shine",
    "Solution",
    "Solver",
    "Stack",
    "State",
    "Status",
    "Stop",
    "Unroll",
    "Unrolled",
    "cells",
    "fixed_point",
    "implicit",
    "load",
    "solve",
    "stability",
    "take_rows",
]

__version__ = _version()


def __getattr__(name: str) -> Any:
    """``load`` is imported when it is used: it needs the extra [train], and the library does not."""
    if name == "load":
        from equilibria.lm.runs.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
