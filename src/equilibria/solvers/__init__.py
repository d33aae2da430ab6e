"""Solvers: one update rule per file. The conformance suite runs on every entry of ``CATALOGUE``."""

from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.solvers.newton_krylov import NewtonKrylov
from equilibria.solvers.picard import Picard
from equilibria.solvers.reversible import Reversible

CATALOGUE = (Picard, Anderson, Broyden, NewtonKrylov, Reversible)

__all__ = ["CATALOGUE", "Anderson", "Broyden", "NewtonKrylov", "Picard", "Reversible"]
