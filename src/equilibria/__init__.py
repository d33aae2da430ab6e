"""Fixed points in PyTorch: a map, a solver, a stopping rule and a gradient rule.

Every public name of the library can be imported from here. Corpora, language models, training and recipes have packages
of their own: ``equilibria.corpora``, ``equilibria.language``, ``equilibria.training`` and ``equilibria.recipes``.
"""

from equilibria import cells, stability
from equilibria.core.evaluator import Evaluator
from equilibria.core.failure import ConvergenceError, ConvergenceWarning
from equilibria.core.gradient import ForwardSolve, GradientRule
from equilibria.core.maps import AffineMap, Linearised, Map
from equilibria.core.solve import Solution, solve
from equilibria.core.solver import Iterate, Solver
from equilibria.core.state import Layout, State
from equilibria.core.stop import Status, Stop
from equilibria.core.trees import take_rows
from equilibria.errors import EquilibriaError
from equilibria.fixed_point import Method, fixed_point, implicit
from equilibria.gradients import Implicit, Neumann, Phantom, ReversibleGradient, Shine, Unroll
from equilibria.layers.cell import Cell, Prepared
from equilibria.layers.equilibrium import Equilibrium
from equilibria.layers.explicit import Stack, Unrolled
from equilibria.layers.layer import Layer, LayerOutput
from equilibria.layers.sequence import SequenceCell
from equilibria.solvers import Anderson, Broyden, NewtonKrylov, Picard, Reversible

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
    "solve",
    "stability",
    "take_rows",
]
