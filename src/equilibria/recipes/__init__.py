"""Recipes: functions that return an experiment. ``equilibria train NAME`` trains it, its flags change the numbers."""

from collections.abc import Callable

from equilibria.recipes.copying import copying
from equilibria.recipes.ptb import ptb
from equilibria.recipes.tiny import tiny
from equilibria.training import Experiment

RECIPES: dict[str, Callable[[], Experiment]] = {"tiny": tiny, "copying": copying, "ptb": ptb}
"""Every recipe of the library by the name that the command line knows it by."""

__all__ = ["RECIPES", "copying", "ptb", "tiny"]
