"""Compiled cells: the same solutions and gradients under every gradient rule, and products that compute nothing else.
Whole models: a solve runs between their graphs, of which there are few, and no step compiles anything new.

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


def printed(name):
    """What a program beside this file prints."""
    program = Path(__file__).with_name(name)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results():
    """What ``compiled_cells.py`` prints."""
    return printed("compiled_cells.py")


@pytest.fixture(scope="module")
def models():
    """What ``compiled_models.py`` prints."""
    return printed("compiled_models.py")


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


def test_compiled_products_by_onednn_are_those_of_pytorch(results):
    assert results["product"] is None or results["product"] < 1e-6


def test_training_with_compiled_cells_gives_the_same_weights(results):
    assert results["training"] < 1e-3


def test_a_compiled_model_is_the_eager_one_at_every_step(models):
    assert max(case["difference"] for case in models["steps"].values()) < 1e-7


@pytest.mark.parametrize(("model", "graphs"), [("layer", 2), ("function", 3), ("checkpoint", 2)])
def test_a_compiled_model_has_few_graphs_and_as_many_for_other_batch_sizes(models, model, graphs):
    """The function is called in a method of its own, in which a graph comes before it."""
    assert models["steps"][f"{model} / aot_eager"]["graphs"] == [graphs] * 3 + [2 * graphs] * 4


def test_a_compiled_language_model_has_few_graphs_and_few_for_its_memory(models):
    graphs = models["steps"]["language / aot_eager"]["graphs"]
    assert graphs[0] <= 4
    assert graphs[1] == graphs[2]  # with memory, after the first step without


def test_an_unrolled_model_is_one_graph(models):
    assert models["steps"]["unrolled / fullgraph"]["graphs"][:3] == [1, 1, 1]
    for memory in ("last", "layers"):
        assert models["steps"][f"explicit {memory} / fullgraph"]["graphs"] == [1, 1, 1]


def test_all_that_solves_stays_out_of_the_graphs(models):
    """Whole steps with their backward pass, gradients inside, evaluation, ``solve``, ``implicit``, ``torch.func``."""
    assert len(models["functions"]) == 6
    assert max(models["functions"].values()) < 1e-7


def test_second_derivatives_are_right_or_refused(models):
    assert models["second"]["eager"] < 1e-7
    assert "double backward" in models["second"]["aot_eager"]


def test_fullgraph_says_what_to_do(models):
    assert all("leave out fullgraph=True, or unroll the equilibrium" in error for error in models["fullgraph"])


def test_a_compiled_cell_runs_inside_a_compiled_model(models):
    calls, evals = models["cell"]
    assert calls >= evals > 5
