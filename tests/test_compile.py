"""A compiled cell: the same solutions and gradients under every gradient rule, and products that compute nothing else.

All but one case run the traced graphs as they are: what is tested is what gets traced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compiled_cells import CASES

pytestmark = [pytest.mark.xdist_group("compiled"), pytest.mark.slow]


@pytest.fixture(scope="module")
def results():
    """What ``compiled_cells.py`` prints."""
    program = Path(__file__).with_name("compiled_cells.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*(f"{rule} / {shape}" for rule, shape in CASES), "inductor"])
def test_the_gradient_is_the_eager_one(results, case):
    found = results["cases"][case]
    compiled, eager = found["evals"]
    assert compiled == eager
    assert found["z"] < 1e-8
    assert found["gradient"] < 1e-6


def test_products_compute_nothing_else(results):
    assert results["leaves"] == [None, 1]  # eager, one graph is for everything; compiled, z is all that it leads to


def test_what_needs_more_than_one_derivative_is_computed_eagerly(results):
    assert results["eager"]["largest"] > 0
    assert all(radius < 1 for radius in results["eager"]["radii"])


def test_training_with_compiled_cells_gives_the_same_weights(results):
    assert results["training"] < 1e-3
