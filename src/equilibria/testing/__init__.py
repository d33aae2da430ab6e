"""Conformance suites: the laws that a solver, a gradient rule and a cell must keep, as classes to inherit.

They need pytest, which ``import equilibria`` does not.
"""

from equilibria.testing.cells import CellSuite
from equilibria.testing.gradients import GradientSuite
from equilibria.testing.sequences import SequenceCellSuite
from equilibria.testing.solvers import SolverSuite

__all__ = ["CellSuite", "GradientSuite", "SequenceCellSuite", "SolverSuite"]
