"""Every setting of the library refuses a value of another type, in a sentence that names the setting."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from equilibria import Unrolled, fixed_point, gradients, solve, solvers, stability
from equilibria.cells import TransformerConfig
from equilibria.cells.chain import ChainConfig
from equilibria.checks import check_fields, hints_of, members_of
from equilibria.core.solver import Solver
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.lm import corpora
from equilibria.lm.experiments import Training, decay
from equilibria.lm.experiments.serialise import kinds_in
from equilibria.lm.recipes import RECIPES
from equilibria.solvers import Anderson, NewtonKrylov, Picard

pytestmark = pytest.mark.usefixtures("unhooked")

CHAIN = ChainConfig((TransformerConfig(), TransformerConfig()))
ARGUMENTS = {
    decay.Milestones: {"steps": (5, 9)},
    gradients.Neumann: {"terms": 2},
    ChainConfig: {"cells": CHAIN.cells},
}
"""Arguments of the settings without defaults."""
WRONG = {
    bool: ("no", None, 2),
    int: ("8", 1.5, float("nan"), True, [1]),
    float: ("1e-3", float("nan"), float("inf"), True, [1.0], 1j, Fraction(1, 3), 10**400),
    str: (3, b"cpu"),
}
"""Values that are not of a type, None apart."""


def settings() -> list[Any]:
    """One value of each kind of settings: those of the core, and those of the recipes."""
    kinds = [Stop, Method, *solvers.CATALOGUE, *gradients.CATALOGUE, *corpora.CATALOGUE, *decay.CATALOGUE, ChainConfig]
    made = {kind: kind(**ARGUMENTS.get(kind, {})) for kind in kinds}
    for recipe in RECIPES.values():
        made |= {type(part): part for part in parts(recipe())}
    return list(made.values())


def parts(value: Any) -> list[Any]:
    """All dataclasses in an experiment."""
    if isinstance(value, tuple):
        return [part for item in value for part in parts(item)]
    if not dataclasses.is_dataclass(value):
        return []
    return [value, *(part for field in dataclasses.fields(value) for part in parts(getattr(value, field.name)))]


def wrong_values(value: Any) -> list[tuple[str, Any]]:
    """Fields of the settings, each with a value of another type."""
    hints = {name: members_of(hint) for name, hint in hints_of(type(value)).items()}
    cases = [(name, wrong) for name, members in hints.items() for wrong in WRONG.get(members[0], ())]
    return [(name, wrong) for name, wrong in cases if not (wrong is None and type(None) in hints[name])]


def test_all_kinds_are_here():
    kinds = {type(value) for value in settings()}
    assert kinds >= set().union(*(kinds_in(recipe()) for recipe in RECIPES.values()))
    assert len(kinds) > 30


@pytest.mark.parametrize("value", settings(), ids=lambda value: type(value).__name__)
def test_a_value_of_another_type_is_refused(value):
    for name, wrong in wrong_values(value):
        sentence = f"{type(value).__name__}({name}={wrong!r}): {name} is "
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            dataclasses.replace(value, **{name: wrong})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NewtonKrylov(jvp="back"), "jvp is one of 'auto', 'forward', 'double', 'differences'; try 'auto'."),
        (
            lambda: ChainConfig(ARGUMENTS[ChainConfig]["cells"], memory="all"),
            "memory is 'blocks' or 'last'; try 'blocks'.",
        ),
        (lambda: decay.Milestones(steps=(5, 7.5)), "steps is a tuple, each entry a whole number."),
        (
            lambda: Anderson(history_dtype="bfloat16"),
            "is a dtype, such as torch.float32 or None; try None.",
        ),
        (lambda: Stop(rtol="1e-3"), "rtol is a finite number; try 0.001."),
    ],
)
def test_the_sentence_says_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def test_numbers_of_numpy_are_numbers():
    assert Anderson(window=np.int64(4), ridge=np.float32(0)) == Anderson(window=4, ridge=0)
    assert Stop(rtol=0, max_evals=np.int32(7)).max_evals == 7


def test_fields_of_a_subclass_are_checked_where_their_types_are_known():
    @dataclasses.dataclass(frozen=True)
    class Mine(Picard):
        scale: float = 1.0
        other: Solver = dataclasses.field(default_factory=Anderson)
        kind: ClassVar[str] = "mine"

    assert Mine(0.5, scale=2.0, other=Picard()).scale == 2.0
    with pytest.raises(ValueError, match=re.escape("Mine(scale='2'): scale is a finite number; try 1.0.")):
        Mine(scale="2")


def test_fields_whose_types_cannot_be_read_are_left_to_their_class():
    class Unknown:
        """A class that only this function knows."""

    @dataclasses.dataclass(frozen=True)
    class Mine:
        unknown: Unknown
        depth: int = 1

    check_fields(Mine(Unknown(), depth="three"))


def test_an_integer_tensor_is_no_setting():
    with pytest.raises(ValueError, match=r"Anderson\(window=tensor\(4\)\): window is a whole number"):
        Anderson(window=torch.tensor(4))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda f, z: fixed_point(f, z, keep=5), "keep=5: these must be increasing numbers of steps"),
        (lambda f, z: fixed_point(f, z, keep="12"), "keep='12': these must be"),
        (lambda f, z: solve(f, z, Picard(), Stop(), keep=(0, 2)), "keep=(0, 2): these must be"),
        (lambda f, z: solve(f, z, Picard(), Stop(), coupled="no"), "solve(coupled='no'): coupled is True or False"),
        (
            lambda f, z: solve(f, z, Picard(), Stop(), drop_converged=2),
            "solve(drop_converged=2): drop_converged is",
        ),
        (lambda f, z: stability.spectral_radius(f, z, coupled="no"), "spectral_radius(coupled='no'): coupled is True"),
        (lambda f, z: stability.check_gradient(f, z, [1.0]), "at least one tensor, each with requires_grad=True"),
        (lambda f, z: Unrolled(torch.nn.Identity(), None), "Unrolled(depth=None): depth is a whole number"),
        (lambda f, z: ChainConfig(cells=(1,)), "ChainConfig(cells=(1,)): these are a tuple of TransformerConfig"),
    ],
)
def test_arguments_of_another_type_are_refused(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(torch.cos, torch.zeros(2, 3))


def test_a_list_of_steps_is_kept_as_a_tuple():
    assert Method(keep=[2, 5]) == Method(keep=(2, 5))
    assert len(fixed_point(torch.cos, torch.zeros(2, 3), keep=[2, 5]).iterates) == 2


def test_a_number_above_zero_is_advised():
    """Elsewhere a clip of 0 means no limit."""
    with pytest.raises(ValueError, match=r"clip=0\): it must be a finite number above 0, or None; try 0\.25\."):
        Training().changed(clip=0)
    with pytest.raises(ValueError, match=r"learning_rate=0\): it must be a finite number above 0; try 0\.001\."):
        Training().changed(learning_rate=0)


def test_the_advice_about_momentum_can_be_followed():
    with pytest.raises(ValueError, match=r"only 'sgd' has momentum; give optimiser='sgd', or momentum=0\."):
        Training().changed(momentum=0.9)
    assert Training().changed(momentum=0.9, optimiser="sgd").optimisation.momentum == 0.9
    with pytest.raises(ValueError, match=r"momentum is in \[0, 1\); try 0\.9"):
        Training().changed(momentum=1.0, optimiser="sgd")
