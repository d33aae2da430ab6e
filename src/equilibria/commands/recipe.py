"""The experiment that a recipe stands for: a name of the library, or FILE.py:FUNCTION."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equilibria.commands.errors import unknown
from equilibria.errors import UsageError
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.serialise import kinds_in
from equilibria.lm.recipes import RECIPES


def experiment_of(recipe: str) -> Experiment:
    """The experiment of the recipe.

    Raises:
        UsageError: there is no such recipe, file or function; names the nearest.
    """
    file, colon, function = recipe.rpartition(":")
    if recipe.endswith(".py"):
        raise UsageError(f"{recipe} is a file; name the function in it that returns an Experiment: {recipe}:FUNCTION.")
    if colon:
        experiment = _function(Path(file), function)()
    elif recipe in RECIPES:
        experiment = RECIPES[recipe]()
    else:
        raise unknown("recipe", recipe, RECIPES)
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"{recipe} returned {type(experiment).__name__}; a recipe is a function returning an Experiment."
        )
    return experiment


def _function(file: Path, name: str) -> Callable[[], Any]:
    if not file.is_file():
        raise UsageError(f"{file} does not exist; a recipe of your own is FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is no Python file; a recipe of your own is FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = {
        key: value
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    }
    if name not in functions:
        raise unknown(f"function in {file}", name, functions)
    return functions[name]


def kinds_of(recipe: str | None) -> set[type]:
    """The dataclasses of a recipe's experiment, which a run may need to be read; none without a recipe."""
    return set() if recipe is None else kinds_in(experiment_of(recipe))
