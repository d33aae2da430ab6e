"""Deep equilibrium models: a cell, a solver, a stopping rule and a gradient rule.

The public vocabulary. Text, training and the command line live in ``equilibria.corpora``, ``equilibria.language``,
``equilibria.training`` and ``equilibria.recipes``.
"""

from equilibria import cells, stability
from equilibria.equilibrium import Cell, Equilibrium, GradientRule, LayerOutput, Stack, Unrolled
from equilibria.fixed_point import fixed_point
from equilibria.gradients import Implicit, Neumann, Phantom, ReversibleGradient, Shine, Unroll
from equilibria.solve import AffineMap, DifferentiableMap, Evaluator, Map, Solution, Solver, Status, Stop, solve
from equilibria.solvers import Anderson, Broyden, NewtonKrylov, Picard, Reversible

__all__ = [
    "AffineMap",
    "Anderson",
    "Broyden",
    "Cell",
    "DifferentiableMap",
    "Equilibrium",
    "Evaluator",
    "GradientRule",
    "Implicit",
    "LayerOutput",
    "Map",
    "Neumann",
    "NewtonKrylov",
    "Phantom",
    "Picard",
    "Reversible",
    "ReversibleGradient",
    "Shine",
    "Solution",
    "Solver",
    "Stack",
    "Status",
    "Stop",
    "Unroll",
    "Unrolled",
    "cells",
    "fixed_point",
    "solve",
    "stability",
]
