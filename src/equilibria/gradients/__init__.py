"""Gradient rules: one per file. The conformance suite runs on every entry of ``CATALOGUE``."""

from equilibria.gradients.implicit import Implicit
from equilibria.gradients.neumann import Neumann
from equilibria.gradients.phantom import Phantom
from equilibria.gradients.reversible import ReversibleGradient
from equilibria.gradients.shine import Shine
from equilibria.gradients.unroll import Unroll

CATALOGUE = (Implicit, Neumann, Phantom, Shine, Unroll, ReversibleGradient)

__all__ = ["CATALOGUE", "Implicit", "Neumann", "Phantom", "ReversibleGradient", "Shine", "Unroll"]
