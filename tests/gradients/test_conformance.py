"""Every gradient rule of the catalogue keeps the laws of the suite."""

from __future__ import annotations

import math

import pytest

from equilibria import (
    Anderson,
    Broyden,
    Implicit,
    Method,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Reversible,
    ReversibleGradient,
    Shine,
    Stop,
    Unroll,
)
from equilibria.gradients import CATALOGUE
from equilibria.testing import GradientSuite

TIGHT = Stop(rtol=1e-12, atol=1e-13, max_evals=300)


class TestImplicitAnderson(GradientSuite):
    twice = True

    def make(self):
        return Method(Anderson(), TIGHT, Implicit(Anderson(), TIGHT))


class TestImplicitBroyden(GradientSuite):
    twice = True

    def make(self):
        return Method(Broyden(), TIGHT, Implicit(Broyden(), TIGHT))


class TestImplicitNewtonKrylov(GradientSuite):
    twice = True
    leaves_no_graph = False

    def make(self):
        return Method(NewtonKrylov(), TIGHT, Implicit(NewtonKrylov(), TIGHT))


class TestImplicitPicard(GradientSuite):
    twice = True

    def make(self):
        return Method(Picard(), TIGHT, Implicit(Picard(), TIGHT))


@pytest.mark.slow
class TestDampedNeumann(GradientSuite):
    def make(self):
        return Method(Anderson(), TIGHT, Neumann(250, 0.5))


class TestNeumann(GradientSuite):
    def make(self):
        return Method(Anderson(), TIGHT, Neumann(80))


class TestPhantom(GradientSuite):
    twice = True

    def make(self):
        return Method(Anderson(), TIGHT, Phantom(80, 1.0))


@pytest.mark.slow
class TestDampedPhantom(GradientSuite):
    twice = True

    def make(self):
        return Method(Anderson(), TIGHT, Phantom(160, 0.5))


class TestUnroll(GradientSuite):
    twice = True

    def make(self):
        return Method(Picard(), TIGHT, Unroll())


@pytest.mark.slow
class TestCheckpointedUnroll(TestUnroll):
    def make(self):
        return Method(Picard(), TIGHT, Unroll(checkpoint=True))


class TestUnrolledAnderson(TestUnroll):
    accuracy = 1e-7  # the derivative of an accelerated iterate converges later than the iterate
    twice_accuracy = 1e-5

    def make(self):
        return Method(Anderson(), TIGHT, Unroll())


class TestUnrolledBroyden(TestUnroll):
    twice_accuracy = 1e-7

    def make(self):
        return Method(Broyden(), TIGHT, Unroll())


@pytest.mark.slow
class TestUnrolledNewtonKrylov(TestUnroll):
    leaves_no_graph = False
    twice = None  # NaN: the derivative of a norm at 0, where the inner iteration has converged

    def make(self):
        return Method(NewtonKrylov(), TIGHT, Unroll())


class TestCheckpointedNewtonKrylov(TestUnrolledNewtonKrylov):
    def make(self):
        return Method(NewtonKrylov(), TIGHT, Unroll(checkpoint=True))


class TestReversibleGradient(GradientSuite):
    accuracy = 1e-3  # truncated at 12 steps, undone with the loss of accuracy that the rule allows

    def make(self):
        return Method(Reversible(0.8), Stop(rtol=1e-12, atol=0, max_evals=25), ReversibleGradient())


class TestJacobianFree(GradientSuite):
    accuracy = math.inf

    def make(self):
        return Method(Anderson(), TIGHT, Neumann(0))


class TestOnePhantomStep(GradientSuite):
    accuracy, twice, twice_accuracy = math.inf, True, math.inf

    def make(self):
        return Method(Anderson(), TIGHT, Phantom(1, 1.0))


class TestShine(GradientSuite):
    accuracy = math.inf

    def make(self):
        return Method(Broyden(rank=60), TIGHT, Shine())


def test_the_catalogue_is_covered():
    suites = [value for value in globals().values() if isinstance(value, type) and issubclass(value, GradientSuite)]
    made = {type(suite().make().gradient) for suite in suites if suite is not GradientSuite}
    assert made == set(CATALOGUE)
