"""Every solver of the catalogue keeps the laws of the suite."""

from __future__ import annotations

import pytest
import torch

from equilibria import Anderson, Broyden, NewtonKrylov, Picard, Reversible
from equilibria.solvers import CATALOGUE
from equilibria.testing import SolverSuite


class TestPicard(SolverSuite):
    needs_contraction = True

    def make(self):
        return Picard()


class TestAnderson(SolverSuite):
    def make(self):
        return Anderson()


@pytest.mark.slow
class TestAndersonInBfloat16(SolverSuite):
    def make(self):
        return Anderson(history_dtype=torch.bfloat16)


class TestBroyden(SolverSuite):
    def make(self):
        return Broyden()


@pytest.mark.slow
class TestBroydenInBfloat16(SolverSuite):
    def make(self):
        return Broyden(history_dtype=torch.bfloat16)


class TestNewtonKrylov(SolverSuite):
    pays_for_whole_steps = True

    def make(self):
        return NewtonKrylov(inner=24)


@pytest.mark.slow
class TestShortNewtonKrylov(TestNewtonKrylov):
    def make(self):
        return NewtonKrylov()


class TestReversible(SolverSuite):
    needs_contraction = True

    def make(self):
        return Reversible(0.8)


def test_the_catalogue_is_covered():
    suites = [value for value in globals().values() if isinstance(value, type) and issubclass(value, SolverSuite)]
    made = {type(suite().make()) for suite in suites if suite is not SolverSuite}
    assert made == set(CATALOGUE)
