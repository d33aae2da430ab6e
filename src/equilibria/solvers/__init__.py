"""Solvers: one update rule per file. ``CATALOGUE`` enters each in the conformance suite."""

from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.solvers.newton_krylov import NewtonKrylov
from equilibria.solvers.picard import Picard
from equilibria.solvers.reversible import Reversible

CATALOGUE = (Picard, Anderson, Broyden, NewtonKrylov, Reversible)

__all__ = ["CATALOGUE", "Anderson", "Broyden", "NewtonKrylov", "Picard", "Reversible"]
